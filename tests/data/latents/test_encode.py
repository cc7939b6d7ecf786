"""A cache from end to end with encoders made of plain arithmetic: what is stored, shared, resumed, refused and read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import reduce
from safetensors import safe_open
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip
from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.datasets.videos import open_videos
from stdit_data.errors import ClipError, DataError
from stdit_data.latents import format as cache
from stdit_data.latents.dataset import LatentDataset
from stdit_data.latents.encode import TextEncoder, VideoEncoder, manifest_metadata, text_job, video_job
from stdit_data.latents.job import Job, Place
from stdit_data.loading.loader import ClipLoader
from stdit_data.storage import listing
from stdit_data.workers.work import Share

ENTRY = 2 * 3 * 2 * 2 * 2 * 2  # bytes of [2C, T, H, W] in bfloat16 for clips of 2x16x16


def moments(video: Tensor) -> Tensor:
    """[1, 3, T, H, W] to a mean (of 8x8 pixels) and a log variance."""
    mean = reduce(video, "b c t (h i) (w j) -> b c t h w", "mean", i=8, j=8)
    return torch.cat([mean, mean - 4], dim=1)


def states(texts: list[str]) -> list[Tensor]:
    return [torch.tensor([[float(ord(letter)), len(text)] for letter in text[:12]]) for text in texts]


VIDEO = VideoEncoder(moments, lambda b: (3, b.frames, b.height // 8, b.width // 8), {"source": "a", "hash": "a1"})
TEXT = TextEncoder(states, lambda text: text.lower().strip(), 2, 12, {"source": "t", "hash": "t1"})


def shapes(length: int = 11) -> ShapesDataset:
    return ShapesDataset(frames=2, height=16, width=16, length=length)


def both(dataset: Any, out: object, **settings: Any) -> list[Job]:
    about = manifest_metadata("shapes", dataset)
    captions = [dataset.caption(i) for i in range(len(dataset))]
    where = {key: settings[key] for key in ("place",) if key in settings}
    return [
        video_job(dataset, str(out), VIDEO, {"crop": "center"}, about, **{"shard_bytes": 4 * ENTRY, **settings}),
        text_job(captions, str(out), TEXT, about, shard_bytes=60, batch=3, **where),
    ]


def encode(dataset: Any, out: object, **settings: Any) -> LatentDataset:
    for job in both(dataset, out, **settings):
        assert job.run()
    return LatentDataset(str(out), copies=settings.get("copies"))


def same(a: Path, b: Path) -> bool:
    """Whether two caches hold the same files, to the byte."""
    names = [sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) for root in (a, b)]
    return names[0] == names[1] and all((a / n).read_bytes() == (b / n).read_bytes() for n in names[0])


@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_is_stored_is_what_was_encoded(where: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out") if where == "local" else f"memory://{tmp_path.name}"
    dataset = shapes()
    for job in both(dataset, out):
        assert job.run()
    found = LatentDataset(out, copies=tmp_path / "copies")
    assert len(found) == 11
    assert found.bucket(3) == Bucket(2, 16, 16)
    assert found.buckets == {Bucket(2, 16, 16): Bucket(2, 2, 2)}
    for index in range(11):
        clip = found.load(index, seed=0, epoch=0)
        expected = dataset.load(index)
        assert torch.equal(clip.video, moments(expected.video[None])[0].bfloat16())
        assert torch.equal(clip.text, states([expected.caption])[0].bfloat16())
        assert (clip.caption, clip.index, clip.fps, clip.span) == (expected.caption, index, 8.0, (0.0, 0.125))
        assert found.entry(index)["source"] == f"shapes:train/0/{index}"
    assert found.metadata["manifest"]["samples"] == 11
    assert cache.list_shards(out, "video") == {0, 1, 2}
    names = {path for path in listing.walk(out) if path.startswith("video/")}
    assert names == {"video/about.json", "video/index.parquet", *(f"video/0000{n}.safetensors" for n in range(3))}


def test_shards_are_whole_safetensors_of_about_the_size_asked_for(tmp_path: Path) -> None:
    encode(shapes(), tmp_path, shard_bytes=5 * ENTRY + 3)
    sizes = []
    for number in range(3):
        with safe_open(tmp_path / "video" / cache.shard_name(number), "pt") as shard:
            tensors = [shard.get_tensor(name) for name in shard.keys()]  # noqa: SIM118  (not a mapping)
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        sizes.append(len(tensors))
    assert sizes == [5, 5, 1]


def test_texts_are_stored_once_and_found_by_every_spelling(tmp_path: Path) -> None:
    captions = ["A cat", "a dog", "a cat ", "A cat", "a very long caption"]
    assert text_job(captions, str(tmp_path), TEXT, {"source": "m", "hash": "1"}, batch=2).run()
    rows = cache.read_index(str(tmp_path), "text").to_pylist()
    key = {row["caption"]: row["key"] for row in rows}
    assert set(key) == set(captions)
    assert key["A cat"] == key["a cat "]
    assert len(set(key.values())) == 3
    assert {row["caption"]: row["tokens"] for row in rows} == {name: min(12, len(name.strip())) for name in captions}
    with safe_open(tmp_path / "text" / cache.shard_name(0), "pt") as shard:
        assert len(list(shard.keys())) == 3
        assert shard.get_tensor(key["a dog"]).shape == (5, 2)


def samples_of(out: object, part: cache.Part = "video") -> list[list[int]]:
    """The samples of each shard."""
    return [
        [row["sample"] for row in cache.read_rows(str(out), part, number)]
        for number in sorted(cache.list_shards(str(out), part))
    ]


def test_clips_and_texts_are_encoded_in_one_random_order(tmp_path: Path) -> None:
    encode(shapes(60), tmp_path / "a", variants=2)
    shards = samples_of(tmp_path / "a")
    order = [sample for shard in shards for sample in shard]
    assert sorted(order[:60]) == list(range(60))
    assert order[:60] == order[60:]  # of each variant the same, so that texts lie as the clips do
    rows = cache.read_index(str(tmp_path / "a"), "text").to_pylist()
    captions = [shapes(60).caption(sample) for sample in order[:60]]
    assert [row["caption"] for row in sorted(rows, key=lambda row: row["key"])] == list(dict.fromkeys(captions))
    encode(shapes(60), tmp_path / "b", seed=1)
    assert samples_of(tmp_path / "b") != shards[:15]
    for part in cache.PARTS:
        assert (cache.read_metadata(str(tmp_path / "b"), part) or {})["shuffle_seed"] == 1


def test_a_cache_of_an_older_version_goes_on_in_its_order(tmp_path: Path) -> None:
    """It has no seed of an order; the part that is missing follows."""
    encode(shapes(), tmp_path)
    about = tmp_path / "video" / cache.METADATA_FILE
    metadata = json.loads(about.read_text())
    del metadata["shuffle_seed"]
    shutil.rmtree(tmp_path / "text")
    for path in (tmp_path / "video").iterdir():
        path.unlink()
    about.write_text(json.dumps(metadata))
    before = about.read_bytes()
    found = encode(shapes(), tmp_path)
    assert samples_of(tmp_path) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert about.read_bytes() == before
    assert found.texts is not None
    rows = sorted(found.texts.table().to_pylist(), key=lambda row: row["key"])
    assert [row["caption"] for row in rows] == list(dict.fromkeys(shapes().caption(i) for i in range(11)))


class Spans:
    """Many clips of each of some sources, side by side as a manifest of cuts has them."""

    def __init__(self, sources: int, spans: int) -> None:
        self.spans, self.length = spans, sources * spans

    def __len__(self) -> int:
        return self.length

    def bucket(self, index: int) -> Bucket:
        return Bucket(1, 8, 8)

    def path(self, index: int) -> str:
        return f"{index // self.spans}.mp4"

    def caption(self, index: int) -> str:
        return ""

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        return Clip(torch.zeros(3, 1, 8, 8), "", index, 8.0)


def test_clips_of_one_source_meet_no_more_often_than_by_chance(tmp_path: Path) -> None:
    """50 sources of 40 clips, 20 clips a shard, a window of 4 shards: pairs in a batch that are of one source."""
    dataset, about = Spans(50, 40), {"source": "m", "hash": "00000001", "samples": 2000}
    settings: dict[str, Any] = {"shard_bytes": 20 * 2 * 6}
    assert video_job(dataset, str(tmp_path / "new"), VIDEO, {}, about, **settings).run()
    cache.lock_metadata(str(tmp_path / "old"), "video", metadata_without_order(tmp_path / "new"))
    assert video_job(dataset, str(tmp_path / "old"), VIDEO, {}, about, **settings).run()
    chance = 39 / 1999
    assert same_source(tmp_path / "new") == pytest.approx(chance, rel=0.1)
    assert same_source(tmp_path / "old") > 8 * chance


def metadata_without_order(out: Path) -> dict[str, Any]:
    metadata = cache.read_metadata(str(out), "video") or {}
    return {key: value for key, value in metadata.items() if key != "shuffle_seed"}


def same_source(out: Path, epochs: int = 5) -> float:
    """The share of a batch's pairs of clips that are of one source, in the order of training."""
    found = LatentDataset(str(out), window=4)
    order = found.make_order([found.bucket(i) for i in range(len(found))], global_batch=20, seed=3)
    assert order.restricted(0)
    same = pairs = 0
    for epoch in range(epochs):
        for number in range(order.batches(epoch)):
            sources = [found.path(slot.sample) for slot in order.batch(epoch, number).slots]
            for place, source in enumerate(sources):
                same += sources[place + 1 :].count(source)
                pairs += len(sources) - place - 1
    return same / pairs


def test_processes_share_the_shards_and_write_what_one_would(tmp_path: Path) -> None:
    encode(shapes(), tmp_path / "one")
    first = [job.run() for job in both(shapes(), tmp_path / "two", place=Place(Share(0, 2)))]
    assert first == [False, False]
    with pytest.raises(DataError, match=r"only 2 of 3 video shards exist"):
        LatentDataset(str(tmp_path / "two"))
    jobs = both(shapes(), tmp_path / "two", place=Place(Share(1, 2)))
    assert (jobs[0].done, jobs[0].total, jobs[0].missing) == (0, 4, [1])
    assert [job.run() for job in jobs] == [True, True]
    assert same(tmp_path / "one", tmp_path / "two")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at any moment: no torn file, no finished shard twice, and in the end what one run would have made."""
    out, log = tmp_path / "killed", tmp_path / "log"

    def slow(video: Tensor) -> Tensor:
        time.sleep(0.01)
        with log.open("a") as file:
            file.write(".")
        return moments(video)

    def begin() -> int:
        """A process of its own, forked: importing torch anew for each would take most of the time."""
        if child := os.fork():
            return child
        with suppress(BaseException):
            torch.set_num_threads(1)
            monkeypatch.setattr(sys.modules[__name__], "VIDEO", replace(VIDEO, encode=slow))
            for job in both(shapes(60), out):
                job.run()
            os._exit(0)
        os._exit(1)

    for attempt in range(4):
        there = cache.list_shards(str(out), "video")
        stamps = {number: (out / "video" / cache.shard_name(number)).stat().st_mtime_ns for number in there}
        child = begin()
        deadline = time.monotonic() + 60
        while attempt < 3 and len(cache.list_shards(str(out), "video")) <= len(there) + 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if attempt < 3:  # somewhere in a shard, at another place each time
            time.sleep(0.013 * attempt)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if attempt < 3 else 0)
        for number in cache.list_shards(str(out), "video"):
            assert len(cache.read_rows(str(out), "video", number)) == 4
            assert (
                number not in stamps or stamps[number] == (out / "video" / cache.shard_name(number)).stat().st_mtime_ns
            )
        assert (out / "video" / cache.INDEX).exists() == (attempt == 3)
    encode(shapes(60), tmp_path / "whole")
    assert same(tmp_path / "whole", out)
    assert 60 <= len(log.read_text()) <= 60 + 3 * 4  # at most the shard in the making was lost, each time


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae": {"source": "b", "hash": "b2"}}, r"another VAE than requested: a \(hash a1\) and b \(hash b2\)"),
        ({"vae": {"source": "b", "hash": "a1", "scale": 0.2}}, r"VAE scale is null there, 0.2 is requested"),
        ({"variants": 2}, r"transform variants is 1 there, 2 is requested"),
        ({"dtype": "float32"}, r'dtype is "bfloat16" there, "float32" is requested'),
        ({"dataset": shapes(12)}, r"another manifest than requested"),
    ],
)
def test_another_setting_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    encode(shapes(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    encoder = VideoEncoder(moments, VIDEO.latent_shape, change.pop("vae", VIDEO.metadata))
    dataset = change.pop("dataset", shapes())
    about = manifest_metadata("shapes", dataset)
    with pytest.raises(DataError, match=message):
        video_job(dataset, str(tmp_path), encoder, {"crop": "center"}, about, shard_bytes=4 * ENTRY, **change)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_same_model_from_another_place_goes_on(tmp_path: Path) -> None:
    encode(shapes(), tmp_path)
    moved = VideoEncoder(moments, VIDEO.latent_shape, {"source": "/elsewhere", "hash": "a1"})
    about = manifest_metadata("a copy", shapes())
    job = video_job(shapes(), str(tmp_path), moved, {"crop": "center"}, about, shard_bytes=4 * ENTRY)
    assert (job.done, job.missing) == (11, [])
    assert job.run()


def test_variants_are_the_epochs_of_the_clip_loader(encode_clip: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for name in "ab":
        encode_clip(tmp_path / "clips" / f"{name}.mp4", frames=30, size=(48, 32))
        (tmp_path / "clips" / f"{name}.txt").write_text(f"clip {name}")
    clips = open_videos(tmp_path / "clips", frames=2, height=16, width=16, crop="random")
    found = encode(clips, tmp_path / "out", variants=3, seed=5)
    assert len(found) == 2
    seen = set()
    for epoch in range(6):
        clip = found.load(1, seed=5, epoch=epoch)
        expected = clips.load(1, seed=5, epoch=epoch % 3)
        assert torch.equal(clip.video, moments(expected.video[None])[0].bfloat16())
        assert clip.span == expected.span
        assert clip.span[1] - clip.span[0] == pytest.approx(0.1)
        seen.add(clip.span)
    assert len(seen) == 3


def test_a_bad_clip_is_one_here_too(encode_clip: Callable[..., Path], tmp_path: Path) -> None:
    """Same order, same stand-in as the clip loader's, whatever the ranks."""
    (tmp_path / "clips").mkdir()
    for name in "abcdefgh":
        encode_clip(tmp_path / "clips" / f"{name}.mp4", frames=12, size=(48, 32))
        (tmp_path / "clips" / f"{name}.txt").write_text(f"clip {name}")
    (tmp_path / "clips" / "c.mp4").write_bytes(b"nothing")
    clips = open_videos(tmp_path / "clips", frames=2, height=16, width=16)
    found = encode(clips, tmp_path / "out")
    with pytest.raises(ClipError, match=r"c\.mp4: .*when it was encoded"):
        found.load(2, seed=0, epoch=0)
    settings: dict[str, Any] = {"global_batch": 4, "seed": 1, "max_reject_share": 0.5}
    expected = [b.indices for b, _ in zip(flat(ClipLoader(clips, **settings)), range(6), strict=False)]
    assert [b.indices for b, _ in zip(flat(ClipLoader(found, **settings)), range(6), strict=False)] == expected
    assert all(2 not in indices for indices in expected)


def flat(loader: ClipLoader) -> Any:
    for batches in loader:
        yield from batches
    loader.close()


def test_too_many_bad_clips_stop_the_job(tmp_path: Path) -> None:
    for name in range(30):
        (tmp_path / f"{name}.mp4").write_bytes(b"nothing")
        (tmp_path / f"{name}.txt").write_text("clip")
    clips = open_videos(tmp_path, frames=2, height=16, width=16)
    with pytest.raises(DataError, match=r"20 of 20 clips can't be read.*stdit data validate --write"):
        encode(clips, tmp_path / "out")


def test_weights_are_kept(encode_clip: Callable[..., Path], tmp_path: Path) -> None:
    for name in "ab":
        encode_clip(tmp_path / f"{name}.mp4", frames=12, size=(48, 32))
    (tmp_path / "m.csv").write_text("path,caption,weight\na.mp4,one,2\nb.mp4,two,0.5\n")
    clips = open_videos(tmp_path / "m.csv", frames=2, height=16, width=16)
    assert clips.weights is not None
    assert encode(clips, tmp_path / "out").weights == list(clips.weights) == [2.0, 0.5]


def test_several_shapes(encode_clip: Callable[..., Path], tmp_path: Path) -> None:
    for name, size in (("a", (48, 32)), ("b", (32, 48)), ("c", (48, 32)), ("d", (32, 48))):
        encode_clip(tmp_path / f"{name}.mp4", frames=12, size=size)
        (tmp_path / f"{name}.txt").write_text(f"clip {name}")
    clips = open_videos(tmp_path, buckets=[Bucket(2, 16, 24), Bucket(2, 24, 16)])
    found = encode(clips, tmp_path / "out", shard_bytes=200)
    assert [found.bucket(i) for i in range(4)] == [clips.bucket(i) for i in range(4)]
    settings: dict[str, Any] = {"global_batch": 2, "seed": 0}
    for (a,), (b,), _ in zip(ClipLoader(clips, **settings), ClipLoader(found, **settings), range(6), strict=False):
        assert a.indices == b.indices
        assert a.bucket == b.bucket
        assert b.video.shape[1:] == (6, 2, b.bucket.height // 8, b.bucket.width // 8)


def test_damage_is_named(tmp_path: Path) -> None:
    encode(shapes(), tmp_path)
    url = tmp_path / "video" / cache.shard_name(1)
    url.write_bytes(url.read_bytes()[:-10])
    found = LatentDataset(str(tmp_path))
    with pytest.raises(DataError, match=r"00001\.safetensors: damaged"):
        found.load(5, seed=0, epoch=0)
    url.unlink()
    with pytest.raises(DataError, match=r"00001\.safetensors: no such file"):
        LatentDataset(str(tmp_path)).load(5, seed=0, epoch=0)
    (tmp_path / "video" / cache.METADATA_FILE).write_text("{}")
    with pytest.raises(DataError, match="not written by `stdit data encode`"):
        LatentDataset(str(tmp_path))


def test_text_of_another_manifest_serves_when_it_has_the_captions(tmp_path: Path) -> None:
    """So that the texts of one stage are those of the next; a missing caption is named."""
    encode(shapes(40), tmp_path / "many")
    encode(shapes(), tmp_path / "few")
    shutil.copytree(tmp_path / "many" / "text", tmp_path / "few" / "text", dirs_exist_ok=True)
    LatentDataset(str(tmp_path / "few")).load(0, seed=0, epoch=0)
    encode(shapes(3), tmp_path / "less")
    shutil.rmtree(tmp_path / "many" / "text")
    shutil.copytree(tmp_path / "less" / "text", tmp_path / "many" / "text")
    with pytest.raises(DataError, match=r"lacks the caption '.*--text-only"):
        LatentDataset(str(tmp_path / "many"))


def test_without_a_text_part(tmp_path: Path) -> None:
    encode(shapes(), tmp_path)
    shutil.rmtree(tmp_path / "text")
    found = LatentDataset(str(tmp_path))
    assert found.load(0, seed=0, epoch=0).text is None
    batch = next(iter(ClipLoader(found, global_batch=2, seed=0)))[0]
    assert batch.texts is None
    assert json.loads((tmp_path / "video" / cache.METADATA_FILE).read_text())["shards"] == 3
