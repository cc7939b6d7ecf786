"""Duplicates: the same file, the same pictures, parts that overlap; and what only seems to be one."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit_data.curation import neighbours
from stdit_data.curation.dedup import HashStep, Matching, _overlapping, dedup
from stdit_data.curation.engine import rejects_path
from stdit_data.curation.neighbours import groups_of, near_pairs
from stdit_data.curation.tables import open_rows
from stdit_data.errors import DataError
from stdit_data.manifests.format import Entry, write_manifest
from stdit_data.workers.executors import Inline


def moving(seed: int) -> list[np.ndarray]:
    """Two seconds of a picture of soft spots that moves right: [H, W, 3] uint8 each."""
    spots = np.random.default_rng(seed).uniform(0, 255, (12, 20, 3)).astype(np.float32)
    picture = cv2.resize(spots, (160, 96), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    return [np.roll(picture, 2 * number, axis=1) for number in range(48)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, encode_clip: Callable[..., Path]) -> Path:
    """a.mp4, its copy, the same less sharp and re-encoded with loss, another clip, and a broken file."""
    folder = tmp_path_factory.mktemp("twins")
    pictures = {seed: moving(seed) for seed in (21, 22)}
    soft = [cv2.GaussianBlur(picture, (0, 0), 2) for picture in pictures[21]]
    common = {"size": (160, 96), "rate": 24, "gop": 24}
    encode_clip(folder / "a.mp4", pictures=pictures[21], options={"crf": "18"}, **common)
    shutil.copy(folder / "a.mp4", folder / "copy.mp4")
    encode_clip(folder / "lossy.webm", pictures=soft, codec="libvpx-vp9", options={"b:v": "60k"}, **common)
    encode_clip(folder / "other.mp4", pictures=pictures[22], **common)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def kept(
    clips: Path, out: Path, *entries: Entry, **values: Any
) -> tuple[list[tuple[str, float | None, int | None]], list[dict[str, Any]]]:
    """Name, start and group of the rows that are kept, and the rejects."""
    manifest = str(clips / f"{out.name}.jsonl")
    write_manifest(manifest, entries)
    url = str(out / "kept.parquet")
    dedup(open_rows(manifest), url, Inline(), step=HashStep(fps=4.0), matching=Matching(**values))
    rows = [(Path(row["path"]).name, row.get("start"), row["group"]) for row in pq.read_table(url).to_pylist()]
    return rows, [json.loads(line) for line in Path(rejects_path(url)).read_text().splitlines()]


def test_a_copy_and_a_re_encoded_twin_are_dropped_and_another_clip_is_not(clips: Path, tmp_path: Path) -> None:
    names = ("lossy.webm", "a.mp4", "other.mp4", "copy.mp4", "broken.mp4")
    rows, rejects = kept(clips, tmp_path, *(Entry(name) for name in names))
    assert rows == [("a.mp4", None, 0), ("other.mp4", None, None)]  # the sharpest, of equal ones the first
    told = {Path(reject["path"]).name: reject for reject in rejects}
    assert set(told) == {"lossy.webm", "copy.mp4", "broken.mp4"}
    assert "looks the same" in told["lossy.webm"]["reason"]
    assert "the same file" in told["copy.mp4"]["reason"]
    assert told["copy.mp4"]["group"] == told["lossy.webm"]["group"] == 0
    assert str(clips / "a.mp4") in json.dumps(told["copy.mp4"])
    assert told["broken.mp4"]["step"] == "hash"


def test_keep_all_drops_nothing_and_names_the_groups(clips: Path, tmp_path: Path) -> None:
    entries = [Entry(name) for name in ("other.mp4", "a.mp4", "lossy.webm")]
    rows, rejects = kept(clips, tmp_path, *entries, keep_all=True)
    assert rows == [("other.mp4", None, None), ("a.mp4", None, 1), ("lossy.webm", None, 1)]
    assert rejects == []


def test_parts_of_a_video_that_overlap_enough(clips: Path, tmp_path: Path) -> None:
    parts = [Entry("a.mp4", start=start, end=end) for start, end in ((0.0, 1.0), (0.25, 1.25), (1.0, 2.0))]
    rows, rejects = kept(clips, tmp_path, *parts)
    assert len(rows) == 2
    assert ("a.mp4", 1.0, None) in rows  # touches the first, and shares a quarter of a second with the second
    (reject,) = rejects
    assert "overlaps in the same file" in reject["reason"]
    rows, rejects = kept(clips, tmp_path, *parts, share=0.9)
    assert [start for _, start, _ in rows] == [0.0, 0.25, 1.0]
    assert rejects == []


def test_a_stricter_distance_keeps_what_is_not_the_same_to_the_bit(clips: Path, tmp_path: Path) -> None:
    rows, _ = kept(clips, tmp_path, Entry("a.mp4"), Entry("lossy.webm"), Entry("copy.mp4"), distance=0, share=1.0)
    assert {name for name, _, _ in rows} >= {"lossy.webm"}
    assert len(rows) == 2


@pytest.mark.parametrize("wrong", [{"distance": -1}, {"distance": 128}, {"share": 0.0}, {"share": 1.5}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="expected 0 to 127 bits and a share above 0, up to 1"):
        Matching(**wrong)


def test_no_clip_that_can_be_read(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 1 clips can be read, see .*kept\.hashes\.rejects\.jsonl"):
        kept(clips, tmp_path, Entry("broken.mp4"))


def slow_pairs(hashes: np.ndarray, starts: np.ndarray, distance: int, share: float) -> list[list[int]]:
    """All pairs of clips whose frames are near by definition."""
    frames = [np.unpackbits(hashes[low:high], axis=1) for low, high in itertools.pairwise(starts)]
    found = []
    for one, other in itertools.combinations(range(len(frames)), 2):
        fewer, more = sorted((frames[one], frames[other]), key=len)
        near = ((fewer[:, None] != more[None]).sum(axis=2) <= distance).any(axis=1) if len(more) else np.zeros(0)
        if near.sum() >= share * len(fewer) and len(fewer):
            found.append([one, other])
    return found


def test_pairs_are_found_as_by_comparing_all_frames_with_all() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, 120)
    starts = np.concatenate([[0], np.cumsum(counts)])
    hashes = rng.integers(0, 256, (starts[-1], 32), np.uint8)
    for copy in range(40):  # of some frames of the clip before, with up to 8 bits changed: a band is sure to be whole
        one, other = 3 * copy, 3 * copy + 1
        for frame in range(min(counts[one], counts[other], 1 + copy % 5)):
            bits = np.unpackbits(hashes[starts[one] + frame])
            bits[rng.integers(0, 256, copy % 9)] ^= 1
            hashes[starts[other] + frame] = np.packbits(bits)
    for share in (0.3, 0.5, 1.0):
        found = near_pairs(hashes, starts, distance=10, share=share)
        assert found.tolist() == slow_pairs(hashes, starts, 10, share)
        assert len(found) > 5
    assert near_pairs(hashes[:0], np.zeros(4, np.int64), distance=10, share=0.5).tolist() == []


def test_a_frame_that_thousands_share_is_compared_with_its_neighbours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "MOST_NEIGHBOURS", 3)
    hashes = np.full((50, 32), 7, np.uint8)
    pairs = near_pairs(hashes, np.arange(51), distance=0, share=1.0)
    assert pairs.tolist() == [[i, j] for i in range(50) for j in range(i + 1, min(i + 4, 50))]
    assert groups_of(50, pairs).tolist() == [0] * 50


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_groups_are_named_by_their_smallest_member(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    count, pairs = drawn
    group = list(range(count))
    for _ in range(count):
        for one, other in pairs:
            group[one] = group[other] = min(group[one], group[other])
    assert groups_of(count, np.array(pairs, np.int64).reshape(-1, 2)).tolist() == group


def test_segments_of_a_file_overlap_as_by_comparing_all_with_all() -> None:
    rng = np.random.default_rng(1)
    file, low = rng.integers(0, 12, 150), rng.integers(0, 20, 150) / 2.0
    high = low + rng.integers(1, 12, 150) / 2.0
    expected = []
    for one, other in itertools.combinations(range(150), 2):
        common = min(high[one], high[other]) - max(low[one], low[other])
        shorter = min(high[one] - low[one], high[other] - low[other])
        if file[one] == file[other] and common >= 0.5 * shorter:
            expected.append([one, other])
    assert sorted(_overlapping(file, low, high, 0.5).tolist()) == expected
