"""Which clips are held out: a matter of each file's name alone."""

from pathlib import PurePosixPath

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stdit_data.errors import DataError
from stdit_data.manifests.split import hash_position, split

names = st.lists(st.from_regex(r"[a-z]{1,3}/[a-z0-9]{1,6}\.mp4", fullmatch=True), min_size=2, max_size=40, unique=True)
shares = st.floats(0.05, 0.95)


def held_of(urls: list[str], share: float) -> list[str]:
    return [url for url in urls if hash_position(url) < share]


@given(names, names, shares)
def test_more_clips_change_nothing_for_those_there(old: list[str], new: list[str], share: float) -> None:
    together = list(dict.fromkeys([*new, *old]))
    assume(0 < len(held_of(old, share)) < len(old))
    kept, held = split(old, share)
    kept_then, held_then = split(together, share)
    assert {old[i] for i in held} == {together[i] for i in held_then} & set(old)
    assert {old[i] for i in kept} == {together[i] for i in kept_then} & set(old)


@given(names, shares)
def test_both_sides_are_all_clips_and_each_is_in_its_order(urls: list[str], share: float) -> None:
    assume(0 < len(held_of(urls, share)) < len(urls))
    kept, held = split(urls, share)
    assert sorted([*kept, *held]) == list(range(len(urls)))
    assert kept == sorted(kept)
    positions = [hash_position(urls[i]) for i in held]
    assert positions == sorted(positions)
    _, reordered = split(urls[::-1], share)
    assert [urls[i] for i in held] == [urls[::-1][i] for i in reordered]


@given(names, shares, shares)
def test_a_larger_share_has_those_of_a_smaller(urls: list[str], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert set(held_of(urls, low)) <= set(held_of(urls, high))


@given(
    st.lists(
        st.tuples(st.sampled_from(["s/a", "s/b", "s/c", "s/d", "s/e", "s/f"]), st.none() | st.sampled_from("xyz")),
        min_size=2,
    ),
    shares,
)
def test_files_and_groups_are_whole(clips: list[tuple[str, str | None]], share: float) -> None:
    urls, groups = zip(*clips, strict=True)
    try:
        kept, held = split(urls, share, groups)
    except DataError:
        assume(False)
    for part in (urls, groups):
        assert not {part[i] for i in kept} & {part[i] for i in held} - {None}
    alone = set(held_of(list(urls), share))
    assert {i for i, url in enumerate(urls) if url in alone} <= set(held)
    if not any(groups):
        assert (kept, held) == split(urls, share)
    again = split(urls, share, [group and group * 2 for group in groups])  # a group's name does not matter
    assert again == (kept, held)


def test_the_share_is_about_what_was_asked_for() -> None:
    _, held = split([f"set/{number:06d}.mp4" for number in range(20000)], 0.05)
    assert 0.045 < len(held) / 20000 < 0.055


def test_a_set_may_be_moved_and_cut(tmp_path: PurePosixPath, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        hash_position("/data/set/a.mp4") == hash_position("/mnt/other/set/a.mp4") == hash_position("s3://x/set/a.mp4")
    )
    assert hash_position("/data/set/a.mp4") != hash_position("/data/set/b.mp4")
    monkeypatch.chdir(str(tmp_path))  # a relative path is the file that it names
    assert hash_position("a.mp4") == hash_position(f"{tmp_path}/a.mp4") == hash_position(f"file://{tmp_path}/a.mp4")
    # the same name in two archives is two clips
    assert hash_position("zip://a.mp4::/x/one.zip") != hash_position("zip://a.mp4::/x/two.zip")
    between = sum(map(hash_position, ("set/a.mp4", "set/b.mp4"))) / 2
    kept, held = split(["set/a.mp4", "set/b.mp4", "set/a.mp4"], between)  # two cuts of a.mp4
    assert [0, 2] in (kept, held)


def test_one_group_of_all_is_refused() -> None:
    with pytest.raises(DataError, match=r"of 3 clips none is .*, since the clips of a group stay together"):
        split(["set/a.mp4", "set/b.mp4", "set/c.mp4"], 0.5, ["one"] * 3)


@pytest.mark.parametrize(("share", "which"), [(1e-9, "none is held out"), (1 - 1e-9, "none is left to train on")])
def test_an_empty_side_is_refused(share: float, which: str) -> None:
    with pytest.raises(DataError, match=f"of 5 clips {which}"):
        split([f"set/{number}.mp4" for number in range(5)], share)
