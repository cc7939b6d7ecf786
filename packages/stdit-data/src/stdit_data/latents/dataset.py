"""Read a cache as a `ClipDataset` of VAE moments and text-encoder states.

C latent channels, T frames, H W latent height and width, L text tokens, D width of the text encoder.
"""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from torch import Tensor

from stdit_data.buckets import Bucket, parse_bucket
from stdit_data.clip import Clip
from stdit_data.errors import ClipError, DataError
from stdit_data.latents import format as cache
from stdit_data.latents.order import WindowedOrder, shard_order
from stdit_data.latents.shards import ShardFiles
from stdit_data.storage import urls

WINDOW = 16  # shards to shuffle over: 4 GB of the default size
AHEAD = 2  # shards to read ahead


class LatentDataset:
    """The encoded clips of a cache; `Clip.video` holds moments [2C, T, H, W] and `Clip.text` states [L, D] as stored.

    The samples are those of the data set that was encoded, in the same order: sample i draws the same noise in
    training, and a clip that could not be read when encoding raises a `ClipError` here. In epoch e variant e modulo
    `variants` of each clip is read.

    Args:
        url: folder or URL of a finished cache.
        window: number of shards over which samples are shuffled, see `latents.order`; 0 for all, which gives the order
            of the clips themselves.
        copies: folder that files of a URL are copied to, see `ShardFiles`.

    Attributes:
        metadata, text_metadata: what the parts were encoded with; `text_metadata` is None without a text part.
        texts: the text part, or None.
        buckets: from the clips' shapes in frames and pixels to the shapes of their latents.
        samples, variants: number of samples, and of random variants of each.

    Raises:
        DataError: the cache does not exist, is not finished or damaged, or its text part lacks a caption.
    """

    moments = True  # clips hold moments instead of pixels

    def __init__(self, url: str, *, window: int = WINDOW, copies: str | Path | None = None) -> None:
        if window < 0:
            raise DataError(f"window {window}: expected a number of shards, or 0 for all")
        self.url = url
        rows = cache.read_index(url, "video")
        self.metadata = cache.read_metadata(url, "video") or {}
        self.text_metadata = cache.read_metadata(url, "text")
        self.buckets = {parse_bucket(name): Bucket(*shape[1:]) for name, shape in self.metadata["shapes"].items()}
        self.samples: int = self.metadata["manifest"]["samples"]
        self.variants: int = self.metadata["transform"]["variants"]
        self.rows = rows
        self._row = np.full((self.variants, self.samples), -1, dtype=np.int64)
        self._row[np.asarray(rows["variant"]), np.asarray(rows["sample"])] = np.arange(len(rows))
        self._shard = np.asarray(rows["shard"])
        shapes = zip(*(rows[name].to_pylist() for name in ("frames", "height", "width")), strict=True)
        self._buckets = [Bucket(*shape) for shape in shapes]  # of rows
        if (self._row < 0).any():
            raise DataError(f"{url}: the index lacks {int((self._row < 0).sum())} entries; encode again")
        if rows["key"].null_count == len(rows):
            raise DataError(f"{url}: no clip could be read; the first: {rows['reason'][0]}")
        self.identity = int(self.metadata["manifest"]["hash"][:8], 16)
        self.window = window or self.metadata["shards"]
        self._videos = ShardFiles(urls.join(url, "video"), self.window + AHEAD + 1, _part(copies, "video"))
        # Texts are in the order of the clips, so those of a window are close together; they may exceed its latents.
        self.texts = CachedTexts(url, keep=4 * self.window, copies=copies) if self.text_metadata is not None else None
        if self.texts is not None:
            self.texts.check(caption.as_py() for caption in pc.unique(rows["caption"]))
        weights = rows["weight"].take(self._row[0])
        self.weights = None if weights.null_count == len(weights) else weights.to_pylist()
        self._ahead = AHEAD
        self._epoch_shards = lru_cache(maxsize=4)(self._find_epoch_shards)

    def subset(self, indices: Sequence[int], *, ahead: bool = True) -> LatentDataset:
        """Select samples; the files are shared with this data set.

        Args:
            indices: indices of the samples, in their new order.
            ahead: read the next shards of an epoch ahead; not useful for a few samples out of many shards.
        """
        part = copy.copy(self)
        part._row, part.samples = self._row[:, indices], len(indices)
        part.identity = zlib.crc32(np.asarray(indices, dtype="<i8").tobytes(), self.identity)
        part.weights = None if self.weights is None else [self.weights[index] for index in indices]
        part._ahead = AHEAD if ahead else 0
        part._epoch_shards = lru_cache(maxsize=4)(part._find_epoch_shards)
        return part

    def __len__(self) -> int:
        return self.samples

    def bucket(self, index: int) -> Bucket:
        """Return the clip's shape in frames and pixels."""
        return self._buckets[int(self._row[0, index])]

    def path(self, index: int) -> str:
        """Return the path or URL of the file that a sample was encoded from."""
        return str(self.rows["source"][int(self._row[0, index])])

    def paths(self) -> Iterator[str]:
        """Yield the paths or URLs of the files that the samples were encoded from."""
        return iter(self.rows["source"].take(pa.array(self._row[0])).to_pylist())

    def groups(self) -> Iterator[str | None] | None:
        """Return the group of each sample, None for those of none; None if there are no groups."""
        groups = self.rows["group"]
        return None if groups.null_count == len(groups) else iter(groups.take(pa.array(self._row[0])).to_pylist())

    def caption(self, index: int) -> str:
        """Return a sample's caption."""
        return str(self.rows["caption"][int(self._row[0, index])])

    def entry(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """Return a sample's row of the index, as column to value."""
        (row,) = self.rows.slice(int(self._row[epoch % self.variants, index]), 1).to_pylist()
        return dict(row)

    def make_order(self, buckets: Any, **settings: Any) -> WindowedOrder:
        """Make the order in which the loader reads the samples; arguments as of `Order`."""
        return WindowedOrder(buckets, shards=self.shards, window=self.window, **settings)

    def shards(self, epoch: int) -> NDArray[np.integer]:
        """Return the shard of every sample in an epoch."""
        shards: NDArray[np.integer] = self._shard[self._row[epoch % self.variants]]
        return shards

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        """Read a sample.

        Raises:
            ClipError: the clip could not be read when it was encoded.
            DataError: a file of the cache is missing or damaged.
        """
        row = int(self._row[epoch % self.variants, index])
        entry = self.rows.slice(row, 1).to_pylist()[0]
        if entry["key"] is None:
            raise ClipError(entry["source"], f"{entry['reason']} (when it was encoded)")
        if self._ahead:
            self._prefetch_after(entry["shard"], seed, epoch)
        moments = self._videos.tensor(entry["shard"], entry["key"])
        text = self.texts(entry["caption"]) if self.texts is not None else None
        span = (entry["start"], entry["end"])
        return Clip(moments, entry["caption"], index, entry["fps"], span, text, self._buckets[row])

    def _prefetch_after(self, shard: int, seed: int, epoch: int) -> None:
        """Read ahead the shards that follow `shard` in the epoch."""
        positions, ordered = self._epoch_shards(seed, epoch)
        position = positions[shard]
        self._videos.prefetch(ordered[position : position + 1 + self._ahead])

    def _find_epoch_shards(self, seed: int, epoch: int) -> tuple[dict[int, int], list[int]]:
        numbers = np.unique(self.shards(epoch)).tolist()
        ordered = shard_order(seed, epoch, numbers)
        return {shard: position for position, shard in enumerate(ordered)}, ordered


class CachedTexts:
    """The text part of a cache: maps captions, as written in the manifest, to states.

    Args:
        url, copies: as for `LatentDataset`.
        keep: number of files to keep open, see `ShardFiles`.

    Raises:
        DataError: the text part does not exist or is not finished.
    """

    def __init__(self, url: str, *, keep: int = 4 * WINDOW, copies: str | Path | None = None) -> None:
        self.url = url
        self._rows = cache.read_index(url, "text")
        self.metadata = cache.read_metadata(url, "text") or {}
        # Keyed by digests: the captions of a large data set would take gigabytes as Python strings.
        self._known = {_digest(caption.as_py()): row for row, caption in enumerate(self._rows["caption"])}
        self._files = ShardFiles(urls.join(url, "text"), keep, _part(copies, "text"))

    def __contains__(self, caption: str) -> bool:
        return _digest(caption) in self._known

    def __call__(self, caption: str) -> Tensor:
        """Return a caption's states [L, D] as stored, without padding.

        Raises:
            DataError: the caption is not in the cache, or its file is missing or damaged.
        """
        self.check([caption])
        row = self._known[_digest(caption)]
        return self._files.tensor(self._rows["shard"][row].as_py(), self._rows["key"][row].as_py())

    def check(self, captions: Iterable[str]) -> None:
        """Check that all captions are in the cache.

        Raises:
            DataError: a caption is missing; the message names the first.
        """
        for caption in captions:
            if caption not in self:
                raise DataError(
                    f"{self.url}: the text part, encoded from {self.metadata['manifest']['source']}, lacks the caption "
                    f"{caption[:60]!r}; encode this manifest's captions with `stdit data encode --text-only`"
                )

    def table(self) -> pa.Table:
        """Return the index of the text part."""
        return self._rows


def _digest(caption: str) -> bytes:
    return hashlib.sha256(caption.encode()).digest()[:16]


def _part(copies: str | Path | None, part: str) -> Path | None:
    return Path(copies) / part if copies is not None else None
