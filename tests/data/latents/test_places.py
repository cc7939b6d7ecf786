"""Where a cache is encoded: in this process, in others, on Ray; the same bytes everywhere, and failures by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.datasets.videos import open_videos
from stdit_data.errors import DataError, FileError
from stdit_data.latents import format as cache
from stdit_data.latents.dataset import LatentDataset
from stdit_data.latents.encode import VideoEncoder, manifest_metadata, text_job, video_job
from stdit_data.latents.job import Job, Place
from stdit_data.storage import atomic, files, listing
from stdit_data.workers.executors import Executor, Inline, Processes, RayCluster
from stdit_data.workers.work import Share

# A module of its own, which other processes can import.
ENCODERS = """
import os, sys
from pathlib import Path

import torch
from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.latents.encode import TextEncoder, VideoEncoder, manifest_metadata, video_job
from stdit_data.latents.job import Place
from stdit_data.workers.executors import Processes

def load_video(notes=None):
    if notes is not None:
        (Path(notes) / str(os.getpid())).touch()

    def encode(video):
        return torch.cat([video[..., ::8, ::8]] * 2, dim=1)

    return VideoEncoder(encode, lambda b: (3, b.frames, b.height // 8, b.width // 8), {"source": "a", "hash": "a1"})

def load_text():
    def encode(texts):
        return [torch.full((1 + len(text) % 5, 2), float(len(text))) for text in texts]

    return TextEncoder(encode, str.strip, 2, 5, {"source": "t", "hash": "t1"})

if __name__ == "__main__":
    dataset = ShapesDataset(frames=2, height=16, width=16, length=60)
    about = manifest_metadata("shapes", dataset)
    place = Place(executor=Processes(2))
    job = video_job(dataset, sys.argv[1], load_video(), {}, about, shard_bytes=96, place=place, load=load_video)
    job.run(lambda done, total: print(done, flush=True))
"""


@pytest.fixture
def encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "plain_encoders.py").write_text(ENCODERS)
    monkeypatch.syspath_prepend(tmp_path)
    import plain_encoders

    yield plain_encoders
    del sys.modules["plain_encoders"]


def encode(encoders: Any, dataset: Any, out: Path, executor: Executor, notes: Path | None = None) -> LatentDataset:
    about, place = manifest_metadata("clips", dataset), Place(executor=executor)
    captions = [dataset.caption(index) for index in range(len(dataset))]
    load = partial(encoders.load_video, notes)
    video = video_job(dataset, str(out), load(), {}, about, shard_bytes=200, place=place, load=load)
    assert video.run()
    assert text_job(
        captions, str(out), encoders.load_text(), about, shard_bytes=100, place=place, load=encoders.load_text
    ).run()
    return LatentDataset(str(out))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def clips(encode_clip: Callable[..., Path], tmp_path: Path) -> Any:
    (tmp_path / "clips").mkdir()
    for number in range(12):
        encode_clip(tmp_path / "clips" / f"{number}.mp4", frames=6 + number, size=(48, 32))
        (tmp_path / "clips" / f"{number}.txt").write_text(f"clip {number}")
    (tmp_path / "clips" / "7.mp4").write_bytes(b"nothing")
    return open_videos(tmp_path / "clips", frames=2, height=16, width=16, interval=1)


def test_three_processes_write_what_one_does(encoders: Any, clips: Any, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    one = encode(encoders, clips, tmp_path / "one", Inline())
    assert one.metadata["shards"] == 6
    encode(encoders, clips, tmp_path / "three", Processes(3), notes)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    loaded = {int(path.name) for path in notes.iterdir()} - {os.getpid()}
    assert 1 <= len(loaded) <= 3  # the model once a process


def test_killed_in_processes_and_started_again(encoders: Any, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, str(tmp_path / "plain_encoders.py"), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 4:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait()
    stamps = {path: path.stat().st_mtime_ns for path in (out / "video").glob("0*.safetensors")}
    assert 2 <= len(stamps) < 60
    dataset = ShapesDataset(frames=2, height=16, width=16, length=60)
    about = manifest_metadata("shapes", dataset)
    for folder in (out, tmp_path / "whole"):
        assert video_job(dataset, str(folder), encoders.load_video(), {}, about, shard_bytes=96).run()
    assert contents(out) == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


@pytest.mark.slow
def test_ray_writes_what_one_process_does(encoders: Any, clips: Any, tmp_path: Path, monkeypatch: Any) -> None:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    encode(encoders, clips, tmp_path / "one", Inline())
    encode(encoders, clips, tmp_path / "ray", RayCluster("local", 2))
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


def job(
    encoders: Any, out: Path | str, change: Callable[[VideoEncoder], VideoEncoder] = lambda encoder: encoder
) -> Job:
    dataset = ShapesDataset(frames=2, height=16, width=16, length=9)
    encoder = change(encoders.load_video())
    return video_job(dataset, str(out), encoder, {}, manifest_metadata("shapes", dataset), shard_bytes=3 * 96)


def test_shards_that_fail_are_named_and_the_others_done(encoders: Any, tmp_path: Path) -> None:
    calls = 0

    def fails_once(encoder: VideoEncoder) -> VideoEncoder:
        def encode(video: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise torch.OutOfMemoryError("no memory\nleft")
            return encoder.encode(video)

        return replace(encoder, encode=encode)

    first = job(encoders, tmp_path / "out", fails_once)
    seen: list[int] = []
    with pytest.raises(
        DataError, match=r"^1 of 3 shards failed \(shard 1: OutOfMemoryError: no memory left\); .*/out, "
    ):
        first.run(lambda done, total: seen.append(done))
    assert cache.list_shards(str(tmp_path / "out"), "video") == {0, 2}
    assert (seen[-1], first.done, first.total) == (6, 6, 9)
    again = job(encoders, tmp_path / "out")
    assert again.missing == [1]
    assert again.run()


def test_a_full_disk_ends_the_job_at_once(encoders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def fill(url: str, part: str, number: int, shard: Any) -> None:
        written.append(number)
        raise FileError(f"{url}: No space left on device")

    monkeypatch.setattr(cache, "write_shard", fill)
    with pytest.raises(FileError, match=r"No space left on device; finished shards are kept in .*/out; run the same"):
        job(encoders, tmp_path / "out").run()
    assert written == [0]


def test_shards_on_another_machine_s_disk_are_noticed(
    encoders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "write_shard", lambda *_: None)
    with pytest.raises(
        DataError, match=r"wrote 00000\.safetensors where this process can't see it; encode into a folder"
    ):
        job(encoders, tmp_path / "out").run()


@pytest.mark.parametrize("where", ["local", "memory"])
def test_of_two_jobs_that_start_at_once_one_encodes(
    where: str, encoders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{tmp_path}/out" if where == "local" else f"memory://{tmp_path.name}/out"
    write_new, jobs = atomic.write_new, []

    def beginning_between(url: str, data: bytes) -> None:
        """Begin the other job after this one has seen that there is no metadata yet."""
        exists = files.exists

        def exists_not(url: str) -> bool:
            monkeypatch.setattr(atomic, "exists", exists)
            monkeypatch.setattr(atomic, "write_new", write_new)
            jobs.append(begin("other"))
            return False

        monkeypatch.setattr(atomic, "exists", exists_not)
        write_new(url, data)

    def begin(source: str) -> Job:
        return job(encoders, out, lambda encoder: replace(encoder, metadata={"source": source, "hash": source}))

    monkeypatch.setattr(atomic, "write_new", beginning_between)
    with suppress(DataError):  # in a store, the other is refused later
        jobs.append(begin("one"))
    ends = []
    for one in jobs:
        try:
            ends.append(one.run())
        except DataError as error:
            assert "another VAE than requested: " in str(error)
    assert ends == [True]
    assert len(jobs) == (1 if where == "local" else 2)


def test_processes_that_end_at_once_leave_each_other_s_index_alone(
    encoders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job(encoders, tmp_path).run()
    index = tmp_path / "video" / ".index.parquet.1.part"
    shard = tmp_path / "video" / ".00001.safetensors.1.part"  # of a worker that was killed
    for path in (index, shard):
        path.touch()
    names = listing.names

    def removed_meanwhile(folder: str) -> list[str]:
        found = names(folder)
        shard.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(listing, "names", removed_meanwhile)
    assert job(encoders, tmp_path).run()
    assert (index.exists(), shard.exists()) == (True, False)


def test_each_process_of_a_share_runs_its_own(encoders: Any, tmp_path: Path) -> None:
    dataset = ShapesDataset(frames=2, height=16, width=16, length=9)
    about, done = manifest_metadata("shapes", dataset), []
    for rank in (2, 0, 1):
        place = Place(Share(rank, 3))
        part = video_job(dataset, str(tmp_path), encoders.load_video(), {}, about, shard_bytes=96, place=place)
        assert part.missing == [rank, rank + 3, rank + 6]
        done.append(part.run())
    assert done == [False, False, True]
