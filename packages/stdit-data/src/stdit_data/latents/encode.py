"""Encodes clips and captions once: the job behind `stdit data encode`.

What goes into which shard is a pure function of the dataset and the settings. So processes share the shards by rank
without speaking to each other, and a job that was killed goes on with the shards that aren't there yet. Every clip is
encoded by itself: what comes out depends on neither ranks nor restarts.

The encoders are functions that the caller hands in; nothing here knows a VAE or a text encoder.
C latent channels, T frames, H W height and width, L text tokens, D width of the text encoder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip, ClipDataset
from stdit_data.errors import ClipError, DataError
from stdit_data.latents import format as cache
from stdit_data.latents.format import Shard
from stdit_data.latents.job import SHARD_BYTES, Job, _cut, _dtype

LEAST_JUDGED = 20  # clips of which too many may be bad before the job stops


@dataclass(frozen=True)
class VideoEncoder:
    """A VAE as the job sees it."""

    encode: Callable[[Tensor], Tensor]  # [1, 3, T, H, W] in [-1, 1] to mean and log variance [1, 2C, T', H', W']
    latent_shape: Callable[[Bucket], tuple[int, ...]]  # a clip's shape to that of its latents, C, T', H', W'
    metadata: Mapping[str, Any]  # source, hash, scale


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder as the job sees it."""

    encode: Callable[[list[str]], list[Tensor]]  # cleaned texts to states [L, D] each, without padding
    clean: Callable[[str], str]
    width: int
    max_length: int
    metadata: Mapping[str, Any]  # source, hash


def video_job(
    dataset: ClipDataset,
    out: str,
    encoder: VideoEncoder,
    transform: Mapping[str, Any],
    manifest: Mapping[str, Any],
    *,
    seed: int = 0,
    variants: int = 1,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    max_reject_share: float = 0.1,
) -> Job:
    """The job that encodes clips.

    Variant v of a clip is what the clip loader would read in epoch v of a run with this seed: its place, crop and
    mirroring are drawn anew. Shards hold one variant after another, in dataset order.

    Args:
        dataset: the clips; also `caption(index)` and `path(index)`.
        out: folder or URL of the cache.
        encoder: the VAE.
        transform, manifest: written down, and compared when the job goes on.
        seed: of the transform's draws.
        variants: how often each clip is encoded.
        dtype: of what is stored.
        shard_bytes: a shard holds as many clips as stay below.
        rank, world: this process of how many.
        workers: threads that read clips.
        max_reject_share: the job stops when more clips than this can't be read.

    Raises:
        DataError: the folder holds something made otherwise, or a size that the VAE can't take.
    """
    if variants < 1 or shard_bytes < 1 or workers < 0:
        raise DataError(f"variants {variants}, shard_bytes {shard_bytes}, workers {workers}: expected numbers from 1")
    shapes = {bucket: _moments(encoder, bucket) for bucket in {dataset.bucket(i) for i in range(len(dataset))}}
    itemsize = _dtype(dtype).itemsize
    sizes = [itemsize * math.prod(shapes[dataset.bucket(i)]) for i in range(len(dataset))]
    about = {
        "format": cache.FORMAT,
        "vae": dict(encoder.metadata),
        "transform": {**transform, "seed": seed, "variants": variants},
        "manifest": dict(manifest),
        "dtype": dtype,
        "shapes": {str(bucket): list(shape) for bucket, shape in sorted(shapes.items())},
    }
    shards = _cut(sizes * variants, shard_bytes)
    reader = _ClipReader(dataset, encoder, shapes, _dtype(dtype), seed, workers, max_reject_share)
    return Job(out, "video", {**about, "shard_bytes": shard_bytes, "shards": len(shards)}, shards, reader, rank, world)


def text_job(
    captions: Sequence[str],
    out: str,
    encoder: TextEncoder,
    manifest: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    batch: int = 16,
    rank: int = 0,
    world: int = 1,
) -> Job:
    """The job that encodes captions: each distinct text once.

    Args:
        captions: of all clips, in dataset order, as the manifest has them.
        out: folder or URL of the cache.
        encoder: the text encoder.
        manifest: written down, and compared when the job goes on.
        dtype: of what is stored.
        shard_bytes: about what a shard holds, by an estimate of each text's tokens.
        batch: texts encoded at once; texts of like length go together.
        rank, world: this process of how many.

    Raises:
        DataError: the folder holds something made otherwise.
    """
    if batch < 1 or shard_bytes < 1:
        raise DataError(f"batch {batch}, shard_bytes {shard_bytes}: expected numbers from 1")
    texts: dict[str, list[str]] = {}  # cleaned to those it was cleaned from
    for caption in dict.fromkeys(captions):
        texts.setdefault(encoder.clean(caption), []).append(caption)
    bytes_a_token = encoder.width * _dtype(dtype).itemsize
    sizes = [bytes_a_token * min(encoder.max_length, 2 + len(text) // 4) for text in texts]
    shards = _cut(sizes, shard_bytes)
    about = {
        "format": cache.FORMAT,
        "text_encoder": dict(encoder.metadata),
        "max_length": encoder.max_length,
        "manifest": dict(manifest),
        "dtype": dtype,
        "texts": len(texts),
        "shard_bytes": shard_bytes,
        "shards": len(shards),
    }
    known = list(texts.items())

    def make(items: range, one_more: Callable[[], None]) -> Shard:
        shard = Shard()
        by_length = sorted(items, key=lambda i: len(known[i][0]))
        for start in range(0, len(by_length), batch):
            part = by_length[start : start + batch]
            for i, states in zip(part, encoder.encode([known[i][0] for i in part]), strict=True):
                key = f"{i:09d}"
                shard.tensors[key] = states.to("cpu", _dtype(dtype)).contiguous()
                for caption in known[i][1]:
                    shard.rows.append({"key": key, "caption": caption, "text": known[i][0], "tokens": len(states)})
                one_more()
        return shard

    return Job(out, "text", about, shards, make, rank, world)


def manifest_metadata(source: str, dataset: Any) -> dict[str, Any]:
    """What is written down of a manifest: its name, a hash of its entries (path, caption, cut, ...), how many."""
    entries = getattr(dataset, "entries", None)
    rows: Any = [asdict(entry) for entry in entries] if entries is not None else dataset.settings()
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return {"source": source, "hash": digest[:16], "samples": len(dataset)}


class _ClipReader:
    """Reads clips ahead in threads, encodes them, and collects a shard."""

    def __init__(
        self,
        dataset: Any,
        encoder: VideoEncoder,
        shapes: Mapping[Bucket, tuple[int, ...]],
        dtype: torch.dtype,
        seed: int,
        workers: int,
        max_share: float,
    ) -> None:
        self.dataset, self.encoder, self.shapes, self.dtype, self.seed = dataset, encoder, shapes, dtype, seed
        self.weights = getattr(dataset, "weights", None)
        self.workers, self.max_share = max(1, workers), max_share
        self.read = self.bad = 0

    def __call__(self, items: range, one_more: Callable[[], None]) -> Shard:
        shard = Shard()
        for item, clip in self._clips(items):
            sample, variant = item % len(self.dataset), item // len(self.dataset)
            row: dict[str, Any] = {"sample": sample, "variant": variant, "source": self.dataset.path(sample)}
            row |= {"caption": self.dataset.caption(sample), **self.dataset.bucket(sample)._asdict()}
            row["weight"] = self.weights[sample] if self.weights is not None else None
            if isinstance(clip, Clip):
                key = f"{sample:09d}.{variant:03d}"
                shard.tensors[key] = self._encode(clip, self.dataset.bucket(sample))
                row |= {"key": key, "start": clip.span[0], "end": clip.span[1], "fps": clip.fps}
            else:
                row["reason"] = clip.reason
            self._judge(clip)
            shard.rows.append(row)
            one_more()
        return shard

    def _encode(self, clip: Clip, bucket: Bucket) -> Tensor:
        moments = self.encoder.encode(clip.video[None])[0]
        if tuple(moments.shape) != self.shapes[bucket]:
            raise DataError(f"the VAE makes {tuple(moments.shape)} of a clip of {bucket}, not {self.shapes[bucket]}")
        return moments.to("cpu", self.dtype).contiguous()

    def _clips(self, items: range) -> Iterator[tuple[int, Clip | ClipError]]:
        """In order; `workers` clips are read ahead."""
        torch.get_num_threads()  # asked before threads start: see `reading`
        waiting: deque[tuple[int, Future[Clip | ClipError]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for item in items:
                    waiting.append((item, pool.submit(self._load, item)))
                    if len(waiting) > self.workers:
                        number, future = waiting.popleft()
                        yield number, future.result()
                while waiting:
                    number, future = waiting.popleft()
                    yield number, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _load(self, item: int) -> Clip | ClipError:
        try:
            return self.dataset.load(item % len(self.dataset), seed=self.seed, epoch=item // len(self.dataset))
        except ClipError as error:
            return error

    def _judge(self, clip: Clip | ClipError) -> None:
        self.read += 1
        self.bad += isinstance(clip, ClipError)
        if self.read >= LEAST_JUDGED and self.bad > self.max_share * self.read:
            raise DataError(
                f"{self.bad} of {self.read} clips can't be read, the last: {clip}; `stdit data validate --write` makes "
                "a manifest without them"
            )


def _moments(encoder: VideoEncoder, bucket: Bucket) -> tuple[int, ...]:
    channels, *rest = encoder.latent_shape(bucket)
    return 2 * channels, *rest
