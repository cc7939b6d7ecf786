"""What a store is asked for: few requests, several at a time, for little more than the bytes that are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from stdit_data.datasets.videos import open_videos
from stdit_data.errors import DataError, FileError
from stdit_data.manifests.format import read_manifest
from stdit_data.manifests.validate import validate
from stdit_data.storage import files
from stdit_data.storage.remote_file import FIRST, KEPT, LEAST, MOST, TAIL, RemoteFile
from stdit_data.video.crop import NO_CROP, find_crop

CLIPS = 100


@pytest.fixture
def folder(counting: Any) -> Any:
    """A folder of clips, half of them in a folder below, each with a caption but the last."""
    for number in range(CLIPS):
        name = f"bucket/{'more/' * (number % 2)}{number:03}"
        counting.content[f"{name}.mp4"] = b"not read"
        if number < CLIPS - 1:
            counting.content[f"{name}.txt"] = f" caption {number}\n".encode()
    return counting


def test_a_folder_is_listed_once_and_its_captions_are_read_in_threads(folder: Any, tmp_path: Path) -> None:
    folder.latency = 0.02
    manifest = read_manifest("counting://bucket")
    asked = Counter((kind, path) for kind, path, _ in folder.requests)
    captions = [path for path in folder.content if path.endswith(".txt")]
    assert asked == {
        ("list", "bucket"): 1,
        ("list", "bucket/more"): 1,
        **{("info", path): 1 for path in captions},  # of a store that does not remember what it has listed
        **{("read", path): 1 for path in captions},
    }
    assert 8 <= folder.most <= 16

    for path, data in folder.content.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    local = read_manifest(f"{tmp_path}/bucket")
    assert list(manifest.entries) == list(local.entries)
    assert [entry.caption for entry in manifest.entries[:2]] == ["caption 0", "caption 2"]
    assert manifest.entries[len(manifest.entries) - 1].caption == ""
    opened = [open_videos(source, empty_captions=True) for source in ("counting://bucket", f"{tmp_path}/bucket")]
    assert opened[0].identity == opened[1].identity


def test_the_first_caption_that_is_wrong_is_told(folder: Any) -> None:
    folder.latency = 0.02  # else all may be read before the fault is seen
    folder.content["bucket/040.txt"] = b"x" * 70_000
    folder.content["bucket/more/031.txt"] = b"\xff"
    with pytest.raises(DataError, match=r"^counting://bucket/040.txt: larger than 64 KiB"):
        read_manifest("counting://bucket")
    assert len(folder.requests) < 150  # and the others are not read


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("counting://nowhere", "no such folder or manifest"),
        ("counting://bucket/000.mp4", r"expected a folder or a manifest .*, found \.mp4"),
        ("counting://bucket/texts", "no videos .* in this folder or below"),
        ("counting://bucket/none.csv", "no such manifest"),
    ],
)
def test_what_is_no_folder_of_clips_is_explained(url: str, words: str, folder: Any) -> None:
    folder.content["bucket/texts/a.txt"] = b"a"
    with pytest.raises(DataError, match=f"^{url}: {words}"):
        read_manifest(url)


def test_of_several_processes_one_reads_a_folder(folder: Any) -> None:
    results = []

    def first(compute: Callable[[], Any]) -> Any:
        results.append(compute())
        return results[-1]

    ours = open_videos("counting://bucket", empty_captions=True, once=first)
    folder.requests.clear()
    theirs = open_videos("counting://bucket", empty_captions=True, once=lambda compute: results[0])
    assert not folder.requests
    assert list(theirs.paths()) == list(ours.paths()) and theirs.identity == ours.identity


def test_sizes_are_asked_for_in_threads(counting: Any, encode_clip: Callable[..., Path], tmp_path: Path) -> None:
    clip = encode_clip(tmp_path / "a.mp4", frames=4).read_bytes()
    for number in range(8):
        counting.content[f"bucket/{number}.mp4"] = clip
        counting.content[f"bucket/{number}.txt"] = b"a clip"
    counting.latency = 0.02
    report = validate(read_manifest("counting://bucket"), workers=8)
    assert [finding.problems for finding in report.findings] == [
        [] if number == 0 else ["the same content as counting://bucket/0.mp4"] for number in range(8)
    ]
    assert counting.most > 4


@pytest.fixture(scope="module")
def noise(encode_clip: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """A video of more than 3 MB, hard to compress, with its index at the end or (`faststart`) at the start."""
    folder = tmp_path_factory.mktemp("noise")
    pictures = list(np.random.default_rng(0).integers(0, 256, (120, 120, 160, 3), dtype=np.uint8))
    finely = {"qp": "10"}

    def encoded(kind: str) -> bytes:
        path = folder / f"{kind}.{'mp4' if kind != 'mkv' else kind}"
        if not path.exists():
            options = {"movflags": "faststart"} if kind == "faststart" else {}
            encode_clip(path, pictures=pictures, size=(160, 120), gop=12, options=finely, container_options=options)
        return path.read_bytes()

    return encoded


def read(url: str, place: str) -> torch.Tensor:
    return (
        open_videos(url, frames=8, height=32, width=32, place=place, empty_captions=True, flip=False)
        .load(0, seed=0, epoch=0)
        .video
    )


@pytest.mark.parametrize("kind", ["plain", "faststart"])
@pytest.mark.parametrize("place", ["start", "center"])
def test_a_clip_costs_about_its_own_bytes(
    kind: str, place: str, noise: Callable[..., bytes], counting: Any, tmp_path: Path
) -> None:
    data = noise(kind)
    assert len(data) > 3_000_000
    counting.content["bucket/a.mp4"] = data
    (tmp_path / "a.mp4").write_bytes(data)
    video = read("counting://bucket", place)
    assert torch.equal(video, read(str(tmp_path), place))
    # 8 frames of interval 3 span 22, and begin up to 12 frames after their key frame; all frames are equally large.
    needed = len(data) * (22 + (12 if place == "center" else 0)) / 120
    reads = [size for kind, _, size in counting.requests if kind == "read"]
    assert 0.6 * needed < sum(reads) < 1.3 * needed
    assert len(reads) <= 3


def test_wherever_a_clip_lies_it_takes_three_requests(
    noise: Callable[..., bytes], counting: Any, tmp_path: Path
) -> None:
    counting.content["bucket/a.mp4"] = data = noise("plain")
    (tmp_path / "a.mp4").write_bytes(data)
    settings: dict[str, Any] = {"frames": 4, "height": 32, "width": 32, "empty_captions": True}
    found, local = (open_videos(source, **settings) for source in ("counting://bucket", tmp_path))
    for epoch in range(40):
        counting.requests.clear()
        clip = found.load(0, seed=0, epoch=epoch)
        assert torch.equal(clip.video, local.load(0, seed=0, epoch=epoch).video)
        assert sum(kind == "read" for kind, *_ in counting.requests) <= 3, clip.span


def test_matroska_is_read_once_for_its_length_and_then_by_its_index(
    noise: Callable[..., bytes], counting: Any, tmp_path: Path
) -> None:
    data = noise("mkv")
    counting.content["bucket/a.mkv"] = data
    (tmp_path / "a.mkv").write_bytes(data)
    for most in (1.0, 0.5):
        counting.requests.clear()
        assert torch.equal(read("counting://bucket", "center"), read(str(tmp_path), "center"))
        reads = [size for kind, _, size in counting.requests if kind == "read"]
        assert sum(reads) <= most * len(data) and len(reads) <= 6


def remote(data: bytes) -> tuple[RemoteFile, list[tuple[int, int]]]:
    asked: list[tuple[int, int]] = []

    def fetch(start: int, end: int) -> bytes:
        asked.append((start, end))
        return data[start:end]

    return RemoteFile("x://a", len(data), fetch), asked


DATA = np.random.default_rng(1).integers(0, 256, 48 << 20, dtype=np.uint8).tobytes()


def test_reads_anywhere_are_exact_and_memory_is_bounded() -> None:
    file, asked = remote(DATA)
    rng = np.random.default_rng(2)
    for at, count in zip(rng.integers(0, len(DATA) + 10, 200), rng.integers(0, 1 << 20, 200), strict=True):
        file.seek(int(at))
        assert file.read(int(count)) == DATA[at : at + count]
        assert sum(map(len, file._spans.values())) <= KEPT + MOST
    file.seek(-5, 2)
    assert file.read() == DATA[-5:] and file.tell() == len(DATA) and file.read(1) == b""
    file.seek(0)
    assert file.read() == DATA
    assert max(end - start for start, end in asked) <= MOST


def test_reading_on_fetches_a_quarter_more() -> None:
    file, asked = remote(DATA)
    while (at := file.tell()) < 8 << 20:
        assert file.read(32 << 10) == DATA[at : at + (32 << 10)]
        assert sum(end - start for start, end in asked) <= max(FIRST, 1.26 * file.tell() + LEAST)
    assert len(asked) < 30
    assert all(end == start for (_, end), (start, _) in pairwise(asked))  # nothing twice


def test_planned_ranges_and_the_end_of_a_file_come_at_once() -> None:
    file, asked = remote(DATA)
    file.plan(5_000_000, 7_000_000)
    for start, stop in ((5_000_000, 6_990_000), (len(DATA) - TAIL + 9, len(DATA))):
        for at in range(start, stop, 32 << 10):
            file.seek(at)
            assert file.read(100) == DATA[at : at + 100]
    assert asked == [(5_000_000, 7_000_000), (len(DATA) - TAIL + 9, len(DATA))]


def test_a_file_that_shrinks_is_told(counting: Any) -> None:
    counting.content["bucket/a.bin"] = DATA[:1_000_000]
    with files.open_binary("counting://bucket/a.bin") as file:
        counting.content["bucket/a.bin"] = DATA[:1000]
        with pytest.raises(FileError, match=r"^counting://bucket/a.bin: ends at byte 1000; has it changed while"):
            file.read(10_000)


def test_the_crop_is_looked_for_in_the_header_alone(noise: Callable[..., bytes]) -> None:
    for kind, name in (("mkv", "matroska,webm"), ("faststart", "mov,mp4")):
        file, asked = remote(noise(kind))
        assert find_crop(cast(Any, file), 0, name) == NO_CROP
        assert asked == [(0, FIRST)]
