"""Reading a cache for training: any number of ranks, exact resuming, copies of a URL's files."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.latents import format as cache
from stdit_data.latents.dataset import LatentDataset
from stdit_data.latents.encode import TextEncoder, VideoEncoder, manifest_metadata, text_job, video_job
from stdit_data.latents.shards import COPIED, STREAMS, ShardFiles
from stdit_data.loading.loader import Batch, ClipLoader
from stdit_data.storage import files


def pool(video: Tensor) -> Tensor:
    """[1, 3, T, H, W] to as many numbers a channel as there are latents, with a log variance of them."""
    mean = video[..., ::8, ::8]
    return torch.cat([mean, -mean], dim=1)


VIDEO = VideoEncoder(pool, lambda b: (3, b.frames, b.height // 8, b.width // 8), {"source": "a", "hash": "a1"})
TEXT = TextEncoder(lambda texts: [torch.full((len(t), 2), len(t)) for t in texts], str.lower, 2, 99, {"source": "t"})


def encode(out: str, length: int = 30) -> str:
    dataset = ShapesDataset(frames=2, height=16, width=16, length=length)
    about = manifest_metadata("shapes", dataset)
    assert video_job(dataset, out, VIDEO, {}, about, shard_bytes=300).run()
    assert text_job([dataset.caption(i) for i in range(length)], out, TEXT, about, shard_bytes=400).run()
    return out


def loader(out: str, *, window: int = 3, **settings: Any) -> ClipLoader:
    return ClipLoader(LatentDataset(out, window=window), **{"global_batch": 6, "seed": 2, **settings})


def steps(loader: ClipLoader, count: int) -> list[list[Batch]]:
    found = list(islice(loader, count))
    loader.close()
    return found


@pytest.mark.parametrize("window", [3, 0])
def test_any_number_of_ranks_reads_the_same_steps(tmp_path: Path, window: int) -> None:
    out = encode(str(tmp_path))
    whole = steps(loader(out, window=window), 12)
    for world in (2, 3):
        parts = [
            steps(loader(out, window=window, rank=rank, world_size=world, workers=rank), 12) for rank in range(world)
        ]
        for step, expected in enumerate(whole):
            batches = [batch for part in parts for batch in part[step]]
            assert [i for batch in batches for i in batch.indices] == expected[0].indices
            assert torch.equal(torch.cat([batch.video for batch in batches]), expected[0].video)
            texts = [text for batch in batches for text in batch.texts or []]
            assert all(torch.equal(a, b) for a, b in zip(texts, expected[0].texts, strict=True))


def test_resuming_is_exact_on_another_number_of_ranks(tmp_path: Path) -> None:
    out = encode(str(tmp_path))
    whole = steps(loader(out), 14)
    first = loader(out)
    reading = iter(first)
    for _ in range(8):  # in the second epoch
        next(reading)
    state = first.state_dict()
    first.close()
    for rank in range(2):
        second = loader(out, rank=rank, world_size=2, micro_batch=1)
        second.load_state_dict(state)
        for batches, expected in zip(steps(second, 6), whole[8:], strict=True):
            assert [b.indices[0] for b in batches] == expected[0].indices[3 * rank : 3 * rank + 3]
            assert {b.step for b in batches} == {expected[0].step}


def test_clips_and_their_cache_come_in_one_order(tmp_path: Path) -> None:
    out = encode(str(tmp_path))
    clips = ClipLoader(ShapesDataset(frames=2, height=16, width=16, length=30), global_batch=6, seed=2)
    for (a,), (b,) in zip(steps(clips, 12), steps(loader(out, window=0), 12), strict=True):
        assert (a.indices, a.captions, a.epoch, a.step, a.fps) == (b.indices, b.captions, b.epoch, b.step, b.fps)
        assert torch.equal(pool(a.video).bfloat16(), b.video)
        assert a.bucket == b.bucket == Bucket(2, 16, 16)
    different = steps(loader(out, window=1), 12)
    assert [b.indices for (b,) in different] != [b.indices for (b,) in steps(loader(out, window=0), 12)]


def test_files_of_a_url_are_copied_and_few_are_kept(tmp_path: Path) -> None:
    url = encode(f"memory://{tmp_path.name}")
    found = LatentDataset(url, window=1, copies=tmp_path / "copies")
    local = LatentDataset(encode(str(tmp_path / "local")), window=1)
    assert found.metadata["shards"] == 10
    for batches, expected in zip(
        islice(ClipLoader(found, global_batch=6, seed=2), 12),
        islice(ClipLoader(local, global_batch=6, seed=2), 12),
        strict=True,
    ):
        assert torch.equal(batches[0].video, expected[0].video)
        # four are kept; the reader and the threads that read ahead may each hold one more for a moment
        assert len(list((tmp_path / "copies" / "video").glob("*.safetensors"))) <= 4 + 1 + COPIED
    assert not list((tmp_path / "copies").rglob("*.part"))


def test_files_of_a_url_are_read_ahead_by_several_requests_at_a_time(counting: Any, tmp_path: Path) -> None:
    local = encode(str(tmp_path / "local"))
    for path in Path(local).rglob("*.*"):
        counting.content[f"bucket/{path.relative_to(local)}"] = path.read_bytes()
    found = LatentDataset("counting://bucket", window=3, copies=tmp_path / "copies")
    counting.requests.clear()
    counting.latency, counting.most = 0.03, 0
    ours = steps(ClipLoader(found, global_batch=6, seed=2, workers=0), 5)
    assert 2 <= counting.most <= COPIED + 1
    for batches, expected in zip(ours, steps(loader(local), 5), strict=True):
        assert batches[0].indices == expected[0].indices
        assert torch.equal(batches[0].video, expected[0].video)


def test_a_large_file_of_a_url_is_copied_by_several_requests_in_order(
    counting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE", 1000)
    numbers = torch.arange(5000)
    stored = save({"a": numbers})
    counting.content["bucket/00000.safetensors"] = stored
    counting.latency = 0.03
    shards = ShardFiles("counting://bucket", 4, tmp_path / "copies")
    assert torch.equal(shards.tensor(0, "a"), numbers)
    assert 4 <= counting.most <= STREAMS
    sizes = [size for kind, _, size in counting.requests if kind == "read"]
    assert len(sizes) == -(-len(stored) // 1000) and sum(sizes) == len(stored)
    assert not list((tmp_path / "copies").glob(".*"))


def test_two_readers_share_the_copies(tmp_path: Path) -> None:
    url = encode(f"memory://{tmp_path.name}")
    first, second = (ShardFiles(f"{url}/video", 4, tmp_path / "copies") for _ in range(2))
    rows = cache.read_index(url, "video").to_pylist()
    key = {row["shard"]: row["key"] for row in rows}
    a = first.tensor(0, key[0])
    (stamp,) = [path.stat().st_ino for path in (tmp_path / "copies").glob("*.safetensors")]
    assert torch.equal(second.tensor(0, key[0]), a)
    assert stamp == next((tmp_path / "copies").glob("*.safetensors")).stat().st_ino
    for shard in range(1, 8):  # beyond what is kept: the first copy goes, and who has it open goes on reading
        second.tensor(shard, key[shard])
    assert not (tmp_path / "copies" / "00000.safetensors").exists()
    assert torch.equal(first.tensor(0, key[0]), a)
    assert torch.equal(ShardFiles(f"{url}/video", 4, tmp_path / "copies").tensor(0, key[0]), a)
