"""A disk that fails: what passes is waited for and changes nothing; what lasts ends the work and blames no clip."""

from __future__ import annotations

import builtins
import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stdit_data.buckets import Bucket
from stdit_data.curation.sampling import read_clip
from stdit_data.datasets.videos import VideoDataset, open_videos
from stdit_data.errors import ClipError, StoreError
from stdit_data.manifests.format import read_manifest
from stdit_data.manifests.validate import sha256, validate
from stdit_data.storage import files, stores
from stdit_data.video.probe import probe
from stdit_data.video.segments import Segment

BUCKETS = [Bucket(1, 32, 48), Bucket(4, 32, 32), Bucket(4, 32, 48)]
CLIPS = 4


class FlakyDisk:
    """Calls of the system and of FFmpeg that fail as `fault` says: by name, path, and how often that was called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.failed, self.code = folder, 0, errno.EIO
        self.fault: Callable[[str, str, int], bool] = lambda name, path, number: False
        self._calls: Counter[tuple[str, str]] = Counter()
        for owner, name in ((builtins, "open"), (os, "scandir"), (os, "stat")):
            monkeypatch.setattr(owner, name, self._flaky(name, getattr(owner, name), OSError))
        monkeypatch.setattr(av, "open", self._flaky("FFmpeg", av.open, av.error.OSError))

    def _flaky(self, name: str, real: Callable[..., Any], kind: Callable[[int, str], Exception]) -> Callable[..., Any]:
        def call(path: Any = ".", *arguments: Any, **named: Any) -> Any:
            if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(self.folder)):
                number, self._calls[name, str(path)] = self._calls[name, str(path)], self._calls[name, str(path)] + 1
                if self.fault(name, str(path), number):
                    self.failed += 1
                    raise kind(self.code, os.strerror(self.code))
            return real(path, *arguments, **named)

        return call


@pytest.fixture
def clips(encode_clip: Callable[..., Path], tmp_path: Path) -> Path:
    """Clips of two shapes and a picture, with captions, in a folder below another."""
    folder = tmp_path / "clips/below"
    folder.mkdir(parents=True)
    for number in range(CLIPS):
        encode_clip(folder / f"{number}.mp4", frames=14, size=(64, 48) if number % 2 else (48, 48))
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(folder / f"{CLIPS}.jpg")
    for number in range(CLIPS + 1):
        (folder / f"{number}.txt").write_text(f"clip {number}")
    return folder.parent


@pytest.fixture
def disk(clips: Path, monkeypatch: pytest.MonkeyPatch) -> FlakyDisk:
    monkeypatch.setattr(stores, "_patience", 1 / 3)
    return FlakyDisk(clips, monkeypatch)


def opened(clips: Path) -> VideoDataset:
    return open_videos(clips, interval=3, flip=False, place="start", buckets=BUCKETS)


@pytest.mark.parametrize(
    ("which", "code"),
    [
        ("open", errno.EIO),
        ("scandir", errno.EIO),
        ("stat", errno.ESTALE),
        ("FFmpeg", errno.EIO),
        ("FFmpeg", errno.EMFILE),
    ],
)
def test_a_fault_that_passes_changes_nothing(which: str, code: int, clips: Path, disk: FlakyDisk) -> None:
    """Listing, captions, sizes, buckets and pixels are those of a disk that never fails."""
    whole = opened(clips)
    assert [str(whole.bucket(index)) for index in range(CLIPS + 1)] == ["4x32x32", "4x32x48"] * 2 + ["1x32x48"]
    disk.code = code
    disk._calls.clear()
    disk.fault = lambda name, path, number: name == which and number == 0
    flaky = opened(clips)
    assert disk.failed
    assert list(flaky.paths()) == list(whole.paths())
    for index in range(CLIPS + 1):
        assert flaky.caption(index) == whole.caption(index) == f"clip {index}"
        assert flaky.bucket(index) == whole.bucket(index)
        disk._calls.clear()
        pair = [dataset.load(index, seed=0, epoch=0).video for dataset in (flaky, whole)]
        assert torch.equal(*pair)


@pytest.mark.parametrize("which", ["open", "FFmpeg"])
def test_a_fault_that_lasts_chooses_no_bucket_and_blames_no_clip(
    which: str, clips: Path, disk: FlakyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, path = opened(clips), f"{clips}/below/3.mp4"
    monkeypatch.setattr(stores, "_patience", 0.3 / 60)
    disk.fault = lambda name, path, number: path.endswith("3.mp4") and name in {which, "open"}
    said = r"below/3.mp4: the disk failed for 0.005 minutes \(OSError: Input/output error\); try again later"
    acts: list[Callable[[], object]] = [lambda: sha256(path)]
    if which == "FFmpeg":  # which opens videos by itself
        acts += [
            lambda: opened(clips),
            lambda: dataset.load(3, seed=0, epoch=0),
            lambda: validate(read_manifest(str(clips))),
            lambda: read_clip(path, Segment()),
        ]
    for act in acts:
        with pytest.raises(StoreError, match=said):
            act()
    disk.fault = lambda name, path, number: path.endswith("below") and name == "scandir"
    with pytest.raises(StoreError, match=r"below: the disk failed"):
        opened(clips)
    disk.fault = lambda name, path, number: path.endswith("3.txt") and name == "open"
    with pytest.raises(StoreError, match=r"3.txt: the disk failed"):
        opened(clips)
    disk.fault = lambda name, path, number: path.endswith("3.mp4") and name == "stat"
    with pytest.raises(StoreError, match=r"3.mp4: the disk failed"):
        files.exists(path)
    with pytest.raises(StoreError, match=r"3.mp4: the disk failed"):
        files.size(path)


def test_what_ffmpeg_calls_a_fault_of_the_disk_may_be_damage(clips: Path, disk: FlakyDisk) -> None:
    """The file is read without FFmpeg to tell; then it is a bad clip, at once."""
    disk.fault = lambda name, path, number: name == "FFmpeg" and path.endswith("2.mp4")
    with pytest.raises(ClipError, match=r"2.mp4: FFmpeg: Input/output error"):
        probe(f"{clips}/below/2.mp4")
    assert disk.failed == 4
    assert validate(read_manifest(str(clips))).findings[2].problems == ["FFmpeg: Input/output error"]


def test_a_manifest_is_read_again(clips: Path, disk: FlakyDisk) -> None:
    for name, text in (
        ("set.csv", "path,caption\na.mp4,one\n"),
        ("set.jsonl", '{"path": "a.mp4", "caption": "one"}\n'),
    ):
        (clips / name).write_text(text)
        disk._calls.clear()
        disk.fault = lambda name, path, number: name == "open" and number == 0
        assert [entry.caption for entry in read_manifest(f"{clips}/{name}").entries] == ["one"]
    assert disk.failed == 2
