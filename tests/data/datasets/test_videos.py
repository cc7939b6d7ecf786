"""Videos as training samples: shape, range, randomness from (seed, epoch, index), images, buckets, what is left out."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from stdit_data.buckets import Bucket
from stdit_data.clip import ClipDataset
from stdit_data.datasets.videos import open_videos
from stdit_data.errors import ClipError, DataError
from stdit_data.loading.loader import ClipLoader
from stdit_data.manifests.entries import Entries
from stdit_data.manifests.format import Entry, write_manifest

SHAPE = {"frames": 4, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def folder(encode_clip: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned clips of differing lengths, one of them upright, and an image."""
    place = tmp_path_factory.mktemp("clips")
    for number, (frames, size) in enumerate(
        [(40, (64, 48)), (30, (96, 48)), (24, (48, 96)), (12, (64, 64)), (5, (64, 48))]
    ):
        encode_clip(place / f"{number}.mp4", frames=frames, size=size)
        (place / f"{number}.txt").write_text(f"caption {number}")
    Image.new("RGB", (80, 60), (255, 0, 0)).save(place / "picture.png")
    (place / "picture.txt").write_text("red")
    return place


def test_a_clip(folder: Path) -> None:
    dataset = open_videos(folder, **SHAPE)
    assert isinstance(dataset, ClipDataset)
    assert len(dataset) == 6
    clip = dataset.load(0, seed=0, epoch=0)
    assert clip.video.shape == (3, 4, 32, 32)
    assert clip.video.dtype == torch.float32
    assert -1 <= clip.video.min() < clip.video.max() <= 1
    assert (clip.caption, clip.index, clip.fps) == ("caption 0", 0, 10.0)  # 30 a second, every third
    assert dataset.bucket(0) == Bucket(4, 32, 32)
    assert open_videos(folder, **SHAPE, fps=12.0).load(0, seed=0, epoch=0).fps == 12.0


def test_pixels_are_those_of_the_frame(folder: Path, full_decode: Any) -> None:
    """From file to [-1, 1] without our code: decode all, resize with Pillow, crop."""
    clip = open_videos(folder, **SHAPE, interval=2, place="start", flip=False).load(1, seed=0, epoch=0)
    _, pictures, _ = full_decode(folder / "1.mp4")
    for j in range(4):
        image = Image.fromarray(pictures[2 * j]).resize((64, 32), Image.Resampling.BICUBIC).crop((16, 0, 48, 32))
        got = (clip.video[:, j].permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(got - np.asarray(image, dtype=np.float32)).mean() < 1.5  # chroma is upsampled more carefully


def test_randomness_is_from_seed_epoch_and_index_alone(folder: Path) -> None:
    dataset = open_videos(folder, **SHAPE, crop="random", interval=1)
    clips = {(s, e): dataset.load(0, seed=s, epoch=e).video for s in range(2) for e in range(3)}
    for (seed, epoch), video in clips.items():
        torch.manual_seed(123)
        np.random.seed(5)
        again = open_videos(folder, **SHAPE, crop="random", interval=1)
        again.load(2, seed=9, epoch=9)
        assert torch.equal(again.load(0, seed=seed, epoch=epoch).video, video)
    distinct = {video.numpy().tobytes() for video in clips.values()}
    assert len(distinct) >= 5
    with ThreadPoolExecutor(4) as pool:  # and from several threads
        jobs = {key: pool.submit(dataset.load, 0, seed=key[0], epoch=key[1]) for key in clips}
        assert all(torch.equal(job.result().video, clips[key]) for key, job in jobs.items())


def test_mirroring_is_half_of_the_time_and_never_against_the_caption(folder: Path) -> None:
    plain = open_videos(folder, **SHAPE, place="start", flip=False).load(0, seed=0, epoch=0).video
    dataset = open_videos(folder, **SHAPE, place="start")
    loaded = [dataset.load(0, seed=0, epoch=epoch).video for epoch in range(200)]
    mirrored = [torch.equal(video, plain.flip(-1)) for video in loaded]
    assert all(m or torch.equal(video, plain) for m, video in zip(mirrored, loaded, strict=True))
    assert 70 <= sum(mirrored) <= 130
    sided = open_videos(folder, **SHAPE, place="start")
    sided.entries = Entries.of([Entry("0.mp4", "it goes left")])
    assert all(torch.equal(sided.load(0, seed=0, epoch=epoch).video, plain) for epoch in range(20))


def test_random_crops_reach_both_ends(folder: Path) -> None:
    """The gradient of the source tells where the crop was."""
    dataset = open_videos(folder, frames=1, height=48, width=48, interval=1, crop="random", place="start", flip=False)
    whole = open_videos(folder, frames=1, height=48, width=96, interval=1, place="start", flip=False)
    full = whole.load(1, seed=0, epoch=0).video
    lefts = []
    for epoch in range(120):
        video = dataset.load(1, seed=0, epoch=epoch).video
        lefts += [left for left in range(49) if torch.equal(video, full[..., left : left + 48])]
    assert len(lefts) == 120
    assert min(lefts) <= 2
    assert max(lefts) >= 46


def test_image_and_short_clips(folder: Path) -> None:
    dataset = open_videos(folder, **SHAPE)
    image = dataset.load(5, seed=0, epoch=0)
    assert image.video.shape == (3, 4, 32, 32)
    assert torch.equal(image.video, image.video[:, :1].expand(3, 4, 32, 32))
    assert image.video[0].min() == 1.0
    assert image.video[1:].max() == -1.0
    with pytest.raises(ClipError, match=r"4.mp4: too short: 5 frames, 10 needed for 4 frames at interval 3"):
        dataset.load(4, seed=0, epoch=0)
    held = open_videos(folder, **SHAPE, short="hold", flip=False).load(4, seed=0, epoch=0).video
    assert torch.equal(held[:, 2], held[:, 3])
    assert not torch.equal(held[:, 1], held[:, 2])


def test_short_clips_that_the_manifest_tells_of_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = folder.parent / "lengths.jsonl"
    entries = [
        Entry(str(folder / "0.mp4"), "long", num_frames=40),
        Entry(str(folder / "4.mp4"), "short", num_frames=5),
        Entry(str(folder / "0.mp4"), "cut", start=0.0, end=0.2, fps=30.0),
        Entry(str(folder / "0.mp4"), "scene", start_frame=10, end_frame=20),
        Entry(str(folder / "4.mp4"), "unknown"),
        Entry(str(folder / "picture.png"), "image"),
    ]
    write_manifest(str(manifest), entries)
    with caplog.at_level(logging.WARNING):
        dataset = open_videos(manifest, **SHAPE)
    assert [entry.caption for entry in dataset.entries] == ["long", "scene", "unknown", "image"]
    assert "2 of 6 clips left out, too short" in caplog.text
    assert len(open_videos(manifest, **SHAPE, short="hold")) == 6
    write_manifest(str(manifest), entries[1:3])
    with pytest.raises(
        DataError, match=r"all 2 clips are too short, 10 source frames are needed.*`--set data\.short=hold`"
    ):
        open_videos(manifest, **SHAPE)


def test_scenes_of_one_file(folder: Path) -> None:
    """Segments in frames give the frames they name, wherever in the segment a sample starts."""
    manifest = folder.parent / "scenes.csv"
    scenes = [Entry(str(folder / "0.mp4"), "a", end_frame=8), Entry(str(folder / "0.mp4"), "b", start_frame=8)]
    write_manifest(str(manifest), scenes)
    cut = open_videos(manifest, frames=8, height=48, width=64, interval=1, flip=False)
    whole = open_videos(folder, frames=40, height=48, width=64, interval=1, flip=False, short="hold")
    full = whole.load(0, seed=0, epoch=0).video
    assert torch.equal(cut.load(0, seed=0, epoch=0).video, full[:, :8])
    for epoch in range(10):
        part = cut.load(1, seed=0, epoch=epoch).video
        assert any(torch.equal(part, full[:, at : at + 8]) for at in range(8, 33))


def test_buckets(folder: Path) -> None:
    """Entries without facts are probed; a clip goes where it fits best, an image to the one-frame bucket."""
    buckets = [Bucket(4, 32, 32), Bucket(4, 32, 64), Bucket(4, 64, 32), Bucket(10, 32, 32), Bucket(1, 48, 64)]
    dataset = open_videos(folder, buckets=buckets)
    assert [dataset.bucket(i) for i in range(6)] == [
        (10, 32, 32),
        (10, 32, 32),
        (4, 64, 32),
        (4, 32, 32),
        (1, 48, 64),  # five frames fill no other
        (1, 48, 64),
    ]
    for index in range(6):
        assert dataset.load(index, seed=0, epoch=0).video.shape[1:] == dataset.bucket(index)
    loader = ClipLoader(dataset, global_batch=2, seed=0)
    for step in islice(loader, 12):
        assert all(batch.video.shape[2:] == batch.bucket for batch in step)
    loader.close()


def test_a_broken_clip_among_buckets_is_rejected_when_read(folder: Path) -> None:
    manifest = folder.parent / "broken.csv"
    (folder.parent / "broken.mp4").write_bytes(b"no video")
    write_manifest(str(manifest), [Entry(str(folder / "0.mp4"), "good"), Entry("broken.mp4", "bad")])
    dataset = open_videos(manifest, buckets=[Bucket(4, 32, 32), Bucket(4, 32, 64)])
    with pytest.raises(ClipError, match=r"broken\.mp4: FFmpeg: Invalid data"):
        dataset.load(1, seed=0, epoch=0)


def test_captions_must_be_there(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.mp4").write_bytes((folder / "0.mp4").read_bytes())
    with pytest.raises(
        DataError, match=r"1 of 1 clips have no caption, the first a.mp4; put each video's caption beside it"
    ):
        open_videos(tmp_path, **SHAPE)
    assert open_videos(tmp_path, **SHAPE, empty_captions=True).load(0, seed=0, epoch=0).caption == ""
    (tmp_path / "set.csv").write_text("path,caption\na.mp4,\n")
    with pytest.raises(DataError, match=r"fill in column 'caption'.*`--set data\.empty_captions=true`"):
        open_videos(tmp_path / "set.csv", **SHAPE)


def test_behind_other_urls(folder: Path, tmp_path: Path) -> None:
    """The same clips from memory and from an archive, read by several threads at once."""
    expected = [open_videos(folder, **SHAPE).load(i, seed=1, epoch=0).video for i in range(3)]
    memory = fsspec.filesystem("memory")
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
            memory.pipe(f"/videos/{path.name}", path.read_bytes())
    for source in (f"zip://::{tmp_path}/set.zip", "memory://videos"):
        dataset = open_videos(source, **SHAPE)
        with ThreadPoolExecutor(6) as pool:
            jobs = [(i % 3, pool.submit(dataset.load, i % 3, seed=1, epoch=0)) for i in range(18)]
        assert all(torch.equal(job.result().video, expected[i]) for i, job in jobs), source


def test_weights_come_from_the_manifest(folder: Path) -> None:
    assert open_videos(folder, **SHAPE).weights is None
    manifest = folder.parent / "weights.csv"
    write_manifest(str(manifest), [Entry(str(folder / "0.mp4"), "a", weight=2.5), Entry(str(folder / "1.mp4"), "b")])
    assert list(open_videos(manifest, **SHAPE).weights) == [2.5, 1.0]


def test_a_run_goes_on_only_with_the_same_clips_in_the_same_order(folder: Path, tmp_path: Path) -> None:
    """Lines that changed places are refused; a set moved as a whole, or a caption corrected, is not."""
    entries = [Entry(f"{number}.mp4", f"caption {number}") for number in range(3)]

    def loader(entries: list[Entry], place: Path = folder) -> ClipLoader:
        write_manifest(str(tmp_path / "set.csv"), entries)
        return ClipLoader(open_videos(tmp_path / "set.csv", root=str(place), **SHAPE), global_batch=2, seed=0)

    state = loader(entries).state_dict()
    shutil.copytree(folder, tmp_path / "moved" / "here")
    for same in (
        loader(entries),
        loader(entries, tmp_path / "moved" / "here"),
        loader([replace(entry, path=str(folder / entry.path)) for entry in entries]),
        loader([replace(entry, caption="corrected") for entry in entries]),
    ):
        same.load_state_dict(state)
    for other in (
        loader([entries[1], entries[0], entries[2]]),
        loader([*entries[:2], replace(entries[2], start=0.1)]),
        loader([*entries[:2], replace(entries[2], path="3.mp4")]),
    ):
        with pytest.raises(DataError, match="the data set lists other clips, or the same in another order"):
            other.load_state_dict(state)


def test_the_identity_of_a_list_of_clips_stays_what_saved_runs_hold(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,caption,start,end\na.mp4,one,,\nb/b.mp4,two,1,2.5\n")
    assert open_videos(tmp_path / "m.csv", frames=2, height=16, width=16).identity == 620167035


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"crop": "left"}, "crop 'left': expected 'center' or 'random'"),
        ({"place": "end"}, "place 'end'"),
        ({"short": "loop"}, "short 'loop'"),
        ({"frames": 0}, "expected numbers from 1"),
        ({"interval": 3, "fps": 8.0}, "expected exactly one of the two"),
        ({"buckets": []}, "buckets: expected at least one"),
    ],
)
def test_settings_that_make_no_sense(folder: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_videos(folder, **{**SHAPE, **values})


def test_training_reads_bad_and_good_files_alike_from_any_rank(folder: Path, tmp_path: Path) -> None:
    """End to end: real files, two of them bad, on one rank and on two; pixels equal, rejects written."""
    manifest = tmp_path / "set.csv"
    (tmp_path / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:600])
    paths = [str(folder / f"{i}.mp4") for i in range(4)] + ["broken.mp4", "missing.mp4"]
    write_manifest(str(manifest), [Entry(path, f"caption {i}") for i, path in enumerate(paths)])
    dataset = open_videos(manifest, **SHAPE, crop="random")
    common = {"global_batch": 4, "seed": 0, "max_reject_share": 0.5}

    def videos(count: int, *, state: dict[str, int] | None = None, **values: Any) -> list[torch.Tensor]:
        loader = ClipLoader(dataset, **common, **values)
        if state is not None:
            loader.load_state_dict(state)
        taken = [torch.cat([batch.video for batch in step]) for step in islice(loader, count)]
        loader.close()
        return taken

    single = videos(6, rejects=tmp_path / "rejects.jsonl", workers=3)
    halves = [videos(6, rank=rank, world_size=2, micro_batch=1) for rank in (0, 1)]
    assert all(torch.equal(one, torch.cat([a, b])) for one, a, b in zip(single, *halves, strict=True))
    first = ClipLoader(dataset, **common, workers=2)
    begun = [torch.cat([batch.video for batch in step]) for step in islice(first, 3)]
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    resumed = [videos(3, rank=rank, world_size=2, state=state) for rank in (0, 1)]  # across the end of the epoch
    begun += [torch.cat(parts) for parts in zip(*resumed, strict=True)]
    assert all(torch.equal(one, other) for one, other in zip(single, begun, strict=True))
    text = (tmp_path / "rejects.jsonl").read_text()
    assert "broken.mp4" in text
    assert "missing.mp4" in text
    assert "no such file" in text
    assert threading.active_count() < 20
