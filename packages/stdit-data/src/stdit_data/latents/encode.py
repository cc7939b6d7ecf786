"""Encode clips and captions into the shards of a cache: the jobs behind `stdit data encode`.

The content of each shard is a pure function of the data set and the settings. So processes share the shards without
communicating, and a job that was killed continues with the missing shards. Every clip is encoded by itself, so the
result depends on neither processes nor restarts.

The encoders are functions given by the caller; this package knows no VAE or text encoder.
C latent channels, T frames, H W height and width, L text tokens, D width of the text encoder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip, ClipDataset
from stdit_data.errors import ClipError, DataError
from stdit_data.latents import format as cache
from stdit_data.latents.format import Part, Shard
from stdit_data.latents.job import SHARD_BYTES, Job, Place, parse_dtype, split_into_shards
from stdit_data.latents.order import encoding_order
from stdit_data.storage import readers, urls
from stdit_data.transforms import to_float

T = TypeVar("T")

MIN_CLIPS = 20  # clips to read before the share of unreadable ones can stop the job


@dataclass(frozen=True)
class VideoEncoder:
    """What a job needs of a VAE."""

    encode: Callable[[Tensor], Tensor]  # [1, 3, T, H, W] in [-1, 1] to mean and log variance [1, 2C, T', H', W']
    latent_shape: Callable[[Bucket], tuple[int, ...]]  # a clip's shape to its latents' shape C, T', H', W'
    metadata: Mapping[str, Any]  # source, hash, scale


@dataclass(frozen=True)
class TextEncoder:
    """What a job needs of a text encoder."""

    encode: Callable[[list[str]], list[Tensor]]  # cleaned texts to states [L, D] each, without padding
    clean: Callable[[str], str]  # applied to captions before they are encoded and compared
    width: int  # D
    max_length: int  # tokens
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
    workers: int = 2,
    max_reject_share: float = 0.1,
    place: Place | None = None,
    load: Callable[[], VideoEncoder] | None = None,
) -> Job:
    """Make the job that encodes clips.

    Variant v of a clip is what the clip loader would read in epoch v of a run with this seed, with start, crop and flip
    drawn for that epoch. Shards hold one variant after another, in the order of `encoding_order`.

    Args:
        dataset: the clips; besides `ClipDataset` it needs `caption(index)` and `path(index)`.
        out: folder or URL of the cache.
        encoder: the VAE.
        transform, manifest: metadata to record, and to compare when a job is resumed.
        seed: seed of the random draws, and of the order that clips are encoded in.
        variants: number of random variants of each clip.
        dtype: storage dtype, `bfloat16` or `float32`.
        shard_bytes: most bytes of tensors in a shard.
        workers: number of threads that read clips, in each process that encodes.
        max_reject_share: stop when more than this share of the clips can't be read.
        place: where the job runs; here by default.
        load: loads the encoder, in each process that encodes; pickled, as the data set is, if these are others.

    Raises:
        DataError: a setting is out of range, the folder holds a cache made with other settings, or the VAE does not
            support a clip's size.
    """
    if variants < 1 or shard_bytes < 1 or workers < 0:
        raise DataError(f"variants {variants}, shard_bytes {shard_bytes}, workers {workers}: expected numbers from 1")
    shapes = {bucket: _moments_shape(encoder, bucket) for bucket in {dataset.bucket(i) for i in range(len(dataset))}}
    itemsize = parse_dtype(dtype).itemsize
    shuffle_seed = _find_shuffle_seed(out, "video", seed)
    order = encoding_order(len(dataset), shuffle_seed)
    sizes = [itemsize * math.prod(shapes[dataset.bucket(i)]) for i in map(int, order)]
    items = np.concatenate([order + variant * len(dataset) for variant in range(variants)])
    shards = [items[part.start : part.stop].tolist() for part in split_into_shards(sizes * variants, shard_bytes)]
    metadata = {
        "format": cache.FORMAT,
        "vae": dict(encoder.metadata),
        "transform": {**transform, "seed": seed, "variants": variants},
        "manifest": dict(manifest),
        "dtype": dtype,
        "shapes": {str(bucket): list(shape) for bucket, shape in sorted(shapes.items())},
        "shard_bytes": shard_bytes,
        "shards": len(shards),
        "shuffle_seed": shuffle_seed,
    }
    load = load or partial(_itself, encoder)
    open_encoder = partial(_ClipEncoder, load, dataset, shapes, parse_dtype(dtype), seed, workers, max_reject_share)
    return Job(out, "video", metadata, shards, open_encoder, place)


def text_job(
    captions: Sequence[str],
    out: str,
    encoder: TextEncoder,
    manifest: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    batch: int = 16,
    place: Place | None = None,
    load: Callable[[], TextEncoder] | None = None,
) -> Job:
    """Make the job that encodes captions, each distinct text once, in the order in which the clips are encoded.

    Args:
        captions: the captions of all clips, in the order of the data set, as in the manifest.
        out: folder or URL of the cache.
        encoder: the text encoder.
        manifest: metadata to record, and to compare when a job is resumed.
        seed: seed of the order that the clips are encoded in.
        dtype: storage dtype, `bfloat16` or `float32`.
        shard_bytes: approximate bytes of a shard, by an estimate of each text's tokens.
        batch: texts to encode at once; texts of similar length are batched together.
        place, load: as for `video_job`.

    Raises:
        DataError: a setting is out of range, or the folder holds a cache made with other settings.
    """
    if batch < 1 or shard_bytes < 1:
        raise DataError(f"batch {batch}, shard_bytes {shard_bytes}: expected numbers from 1")
    captions_by_text: dict[str, list[str]] = {}  # cleaned text to the captions that it comes from
    shuffle_seed = _find_shuffle_seed(out, "text", seed)
    for caption in dict.fromkeys(captions[i] for i in encoding_order(len(captions), shuffle_seed)):
        captions_by_text.setdefault(encoder.clean(caption), []).append(caption)
    texts = [_Text(f"{i:09d}", text, tuple(spellings)) for i, (text, spellings) in enumerate(captions_by_text.items())]
    token_bytes = encoder.width * parse_dtype(dtype).itemsize
    sizes = [token_bytes * min(encoder.max_length, 2 + len(one.text) // 4) for one in texts]
    shards = [texts[part.start : part.stop] for part in split_into_shards(sizes, shard_bytes)]
    metadata = {
        "format": cache.FORMAT,
        "text_encoder": dict(encoder.metadata),
        "max_length": encoder.max_length,
        "manifest": dict(manifest),
        "dtype": dtype,
        "texts": len(texts),
        "shard_bytes": shard_bytes,
        "shards": len(shards),
        "shuffle_seed": shuffle_seed,
    }
    open_encoder = partial(_CaptionEncoder, load or partial(_itself, encoder), parse_dtype(dtype), batch)
    return Job(out, "text", metadata, shards, open_encoder, place)


def manifest_metadata(source: str, dataset: Any) -> dict[str, Any]:
    """Return what a cache records of its data set.

    Args:
        source: name of the data set: a path, a URL, or `shapes`.
        dataset: the data set; has `entries` of a manifest, or `settings()`.

    Returns:
        The source, a hash of all entries (path, caption, segment and so on) and the number of samples.
    """
    entries = getattr(dataset, "entries", None)
    digest = hashlib.sha256()
    if entries is None:
        digest.update(json.dumps(dataset.settings(), sort_keys=True).encode())
    else:  # as a list, a row at a time
        for number, entry in enumerate(entries):
            digest.update((", " if number else "[").encode() + json.dumps(asdict(entry), sort_keys=True).encode())
        digest.update(b"]")
    return {"source": source, "hash": digest.hexdigest()[:16], "samples": len(dataset)}


class _Text(NamedTuple):
    """A text to encode."""

    key: str  # of its tensor
    text: str  # cleaned
    captions: tuple[str, ...]  # that it comes from


class _CaptionEncoder:
    """Encodes texts, one shard per call."""

    def __init__(self, load: Callable[[], TextEncoder], dtype: torch.dtype, batch: int) -> None:
        self.encoder, self.dtype, self.batch = load(), dtype, batch

    def __call__(self, items: Sequence[_Text], on_entry: Callable[[], None]) -> Shard:
        shard = Shard()
        by_length = sorted(items, key=lambda item: len(item.text))
        for start in range(0, len(by_length), self.batch):
            part = by_length[start : start + self.batch]
            for item, states in zip(part, self.encoder.encode([item.text for item in part]), strict=True):
                shard.tensors[item.key] = states.to("cpu", self.dtype).contiguous()
                for caption in item.captions:
                    row = {"key": item.key, "caption": caption, "text": item.text, "tokens": len(states)}
                    shard.rows.append(row)
                on_entry()
        return shard


class _ClipEncoder:
    """Reads clips ahead in threads and encodes them, one shard per call."""

    def __init__(
        self,
        load: Callable[[], VideoEncoder],
        dataset: Any,
        shapes: Mapping[Bucket, tuple[int, ...]],
        dtype: torch.dtype,
        seed: int,
        workers: int,
        max_share: float,
    ) -> None:
        self.encoder, self.dataset, self.shapes, self.dtype, self.seed = load(), dataset, shapes, dtype, seed
        self.weights = getattr(dataset, "weights", None)
        groups = dataset.groups() if hasattr(dataset, "groups") else None
        self.groups = None if groups is None else list(groups)
        self.workers, self.max_share = max(1, workers), max_share
        self.read = self.bad = 0

    def __call__(self, items: Sequence[int], on_entry: Callable[[], None]) -> Shard:
        shard = Shard()
        for item, clip in self._clips(items):
            sample, variant = item % len(self.dataset), item // len(self.dataset)
            row: dict[str, Any] = {
                "sample": sample,
                "variant": variant,
                "source": urls.printable(self.dataset.path(sample)),
            }
            row |= {"caption": self.dataset.caption(sample), **self.dataset.bucket(sample)._asdict()}
            row["group"] = self.groups[sample] if self.groups is not None else None
            row["weight"] = self.weights[sample] if self.weights is not None else None
            if isinstance(clip, Clip):
                key = f"{sample:09d}.{variant:03d}"
                shard.tensors[key] = self._encode(clip, self.dataset.bucket(sample))
                row |= {"key": key, "start": clip.span[0], "end": clip.span[1], "fps": clip.fps}
            else:
                row["reason"] = clip.reason
            self._count(clip)
            shard.rows.append(row)
            on_entry()
        return shard

    def _encode(self, clip: Clip, bucket: Bucket) -> Tensor:
        moments = self.encoder.encode(to_float(clip.video)[None])[0]
        if tuple(moments.shape) != self.shapes[bucket]:
            raise DataError(
                f"the VAE encodes a clip of {bucket} to {tuple(moments.shape)}; expected {self.shapes[bucket]}"
            )
        return moments.to("cpu", self.dtype).contiguous()

    def _clips(self, items: Sequence[int]) -> Iterator[tuple[int, Clip | ClipError]]:
        """Read clips in order, `workers` of them ahead."""
        torch.get_num_threads()  # called before threads start, see `loading.prefetch.read_ahead`
        waiting: deque[tuple[int, Future[Clip | ClipError]]] = deque()
        with readers.threads(self.workers) as pool:
            for item in items:
                waiting.append((item, pool.submit(self._load, item)))
                if len(waiting) > self.workers:
                    number, future = waiting.popleft()
                    yield number, future.result()
            while waiting:
                number, future = waiting.popleft()
                yield number, future.result()

    def _load(self, item: int) -> Clip | ClipError:
        try:
            clip: Clip = self.dataset.load(item % len(self.dataset), seed=self.seed, epoch=item // len(self.dataset))
            return clip
        except ClipError as error:
            return error

    def _count(self, clip: Clip | ClipError) -> None:
        self.read += 1
        self.bad += isinstance(clip, ClipError)
        if self.read >= MIN_CLIPS and self.bad > self.max_share * self.read:
            raise DataError(
                f"{self.bad} of {self.read} clips can't be read, the last: {clip}; write a manifest without them with "
                "`stdit data validate --write`"
            )


def _itself(encoder: T) -> T:
    return encoder


def _find_shuffle_seed(out: str, part: Part, seed: int) -> int | None:
    """Return the seed of the order that a part is encoded in: that of the cache if one of its parts is there.

    Parts that older versions began have none, and are in the order of the data set.
    """
    for one in (part, *cache.PARTS):
        if (metadata := cache.read_metadata(out, one)) is not None:
            recorded: int | None = metadata.get("shuffle_seed")
            return recorded
    return seed


def _moments_shape(encoder: VideoEncoder, bucket: Bucket) -> tuple[int, ...]:
    channels, *rest = encoder.latent_shape(bucket)
    return 2 * channels, *rest
