"""What `validate` finds, and that it finds nothing where nothing is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip
from stdit_data.manifests.format import Entry, read_manifest, write_manifest
from stdit_data.manifests.validate import Report, check_dataset, good_entries, sha256, validate
from stdit_data.video.segments import Sampling


@pytest.fixture(scope="module")
def clips(encode_clip: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("clips")
    encode_clip(place / "a.mp4", frames=60, rate=30, gop=10, container_options={"movflags": "faststart"}, size=(96, 64))
    encode_clip(place / "b.webm", codec="libvpx-vp9", frames=20, rate=10)
    encode_clip(place / "c.mkv", frames=9, rate=30)
    (place / "copy.mp4").write_bytes((place / "a.mp4").read_bytes())
    data = (place / "a.mp4").read_bytes()
    (place / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    (place / "broken.mp4").write_bytes(b"not a video")
    return place


def check(clips: Path, *entries: Entry, **values: object) -> Report:
    path = clips / "set.csv"
    write_manifest(str(path), entries)
    return validate(read_manifest(str(path)), **values)  # type: ignore[arg-type]


def problems(report: Report) -> list[list[str]]:
    return [finding.problems for finding in report.findings]


def test_nothing_wrong(clips: Path) -> None:
    calls: list[tuple[int, int]] = []
    entries = [Entry("a.mp4", "A"), Entry("b.webm", "B"), Entry("c.mkv", "C"), Entry("a.mp4", "later", start=1.0)]
    for thorough in (False, True):
        report = check(clips, *entries, thorough=thorough, progress=lambda *now: calls.append(now))
        assert problems(report) == [[], [], [], []]
    assert calls == [(i, 4) for i in range(1, 5)] * 2
    facts = [finding.metadata for finding in report.findings]
    assert [(f.codec, f.width, f.height, f.frames, f.fps) for f in facts if f] == [
        ("h264", 96, 64, 60, 30.0),
        ("vp9", 64, 48, 20, 10.0),
        ("h264", 64, 48, 9, 30.0),
        ("h264", 96, 64, 60, 30.0),
    ]
    summary = report.summary()
    assert summary["frames"] == "9 to 60"
    assert summary["duration"] == "5.3 s in all, 0.30 to 2.00 s each"  # 2 + 2 + 0.3, and the second half of a.mp4
    assert [finding.frames for finding in report.findings] == [60, 20, 9, 30]
    assert summary["codecs"] == "h264 (3), vp9 (1)"
    assert summary["frames per second"] == "10.00 to 30.00"
    assert summary["entries with problems"] == "0"


def test_everything_wrong(clips: Path) -> None:
    report = check(
        clips,
        Entry("a.mp4", "good"),
        Entry("missing.mp4", "gone"),
        Entry("broken.mp4", "broken"),
        Entry("cut.mp4", "truncated"),
        Entry("b.webm", ""),
        Entry("a.mp4", "again"),
        Entry("copy.mp4", "copy"),
        Entry("c.mkv", "cut", start=5.0, end=6.0),
        Entry("c.mkv", "facts", start_frame=1, width=640, fps=24.0, num_frames=9),
    )
    expected = [
        [],
        ["no such file"],
        ["FFmpeg: Invalid data found when processing input"],
        ["truncated: 60 frames declared, data for"],
        ["no caption (column 'caption' is empty)"],
        ["a duplicate of entry 0"],
        [f"the same content as {clips / 'a.mp4'}"],
        ["no frames in the segment, 5 to 6 s; the video has 9 frames, the last at 0.267 s"],
        ["width is 64, the manifest says 640", "fps is 30, the manifest says 24"],
    ]
    for found, wanted in zip(problems(report), expected, strict=True):
        assert len(found) == len(wanted), found
        assert all(one.startswith(words) for one, words in zip(found, wanted, strict=True)), found
    assert len(report.bad) == 8


def test_one_file_under_two_names_is_one_file(clips: Path) -> None:
    there = str(clips / ".." / clips.name / "a.mp4")
    report = check(clips, Entry("a.mp4", "A", end=1.0), Entry(there, "B", start=1.0), Entry(there, "C", end=1.0))
    assert problems(report) == [[], [], ["a duplicate of entry 0"]]


def test_too_short_for_a_stage(clips: Path) -> None:
    report = check(clips, Entry("a.mp4", "A"), Entry("c.mkv", "C"), sampling=Sampling(16, interval=3))
    assert problems(report)[0] == []
    assert problems(report)[1] == [
        "too short: 9 frames, 46 needed for 16 frames at interval 3 "
        "(short='hold', in a run `--set data.short=hold`, repeats the last frame)"
    ]


def test_checksums_are_compared_when_thorough(clips: Path) -> None:
    right = Entry("a.mp4", "A", sha256=sha256(str(clips / "a.mp4")).upper())
    wrong = Entry("c.mkv", "C", sha256="0" * 64)
    assert problems(check(clips, right, wrong)) == [[], []]
    assert problems(check(clips, right, wrong, thorough=True)) == [[], ["sha256 differs from the manifest's"]]


def test_thorough_decodes_all(clips: Path, encode_clip: Callable[..., Path], tmp_path: Path) -> None:
    """Damage in the middle of a file is between the frames that a quick look decodes."""
    path = encode_clip(tmp_path / "a.mkv", frames=90, gop=30, size=(128, 96), b_frames=0)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = bytes(300)
    path.write_bytes(data)
    entry = Entry(str(path), "A")
    assert problems(check(clips, entry)) == [[]]
    assert len(problems(check(clips, entry, thorough=True))[0]) == 1


def test_a_manifest_of_the_good_ones_with_their_facts(clips: Path, tmp_path: Path) -> None:
    entries = [Entry("a.mp4", "A", weight=2.0), Entry("missing.mp4", "gone"), Entry("b.webm", "B")]
    report = check(clips, *entries)
    manifest = read_manifest(str(clips / "set.csv"))
    write_manifest(str(tmp_path / "good.parquet"), good_entries(manifest, report))
    good = read_manifest(str(tmp_path / "good.parquet")).entries
    assert good == [
        replace(entries[0], path=str(clips / "a.mp4"), fps=30.0, width=96, height=64, num_frames=60),
        replace(entries[2], path=str(clips / "b.webm"), fps=10.0, width=64, height=48, num_frames=20),
    ]
    assert not validate(read_manifest(str(tmp_path / "good.parquet"))).bad


def test_report_file(clips: Path, tmp_path: Path) -> None:
    report = check(clips, Entry("a.mp4", "A"), Entry("missing.mp4", "gone"))
    report.write(str(tmp_path / "report.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [row["problems"] for row in rows] == [[], ["no such file"]]
    assert rows[0]["facts"]["frames"] == 60


def test_folder_without_captions_says_where_to_put_them(clips: Path) -> None:
    found = validate(read_manifest(str(clips))).findings
    assert found[0].problems == ["no caption (put it in a.txt beside the file)"]


def test_check_of_any_dataset() -> None:
    class Odd:
        def __len__(self) -> int:
            return 4

        def bucket(self, index: int) -> Bucket:
            return Bucket(2, 8, 8)

        def load(self, index: int, *, seed: int, epoch: int) -> Clip:
            shape = (3, 2, 8, 9) if index == 1 else (3, 2, 8, 8)
            video = torch.full(shape, 3.0) if index == 2 else torch.rand(shape) if index == 3 else torch.zeros(shape)
            return Clip(video, "" if index == 0 else "x", index, 8.0)

    report = check_dataset(Odd())
    assert problems(report) == [
        ["no caption"],
        ["shape (3, 2, 8, 9), expected 2x8x8 by `bucket`"],
        ["torch.float32 in 3 to 3, expected float32 in -1 to 1"],
        ["loading again with the same seed, epoch and index gives another clip"],
    ]
