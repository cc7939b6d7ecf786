"""Order the samples of a cache: shuffle the shards, then the samples within a sliding window of shards.

The window is a true shuffle only if a shard holds a random choice of clips. So they are encoded in a random order too,
`encoding_order`: in the manifest's, the clips cut from one video would share a shard, and meet in a batch.

Rules, in addition to those of `loading.order`
----------------------------------------------
- Every epoch shuffles the shards by (seed, epoch). A sample's place in the epoch is its shard's position plus `window`
  times a random number in 0..1, by (seed, epoch, bucket). So when a shard begins, only the `window` shards
  before it can still be needed: each file is read once, and `window` files are in use at a time.
- Batches are ordered by the place of their last sample, over all buckets.
- With a window of all shards or more, the order is exactly that of `loading.order`.

The order is a pure function of (seed, epoch, batch), like that of clips.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stdit_data.buckets import Bucket
from stdit_data.errors import DataError
from stdit_data.loading.order import SHUFFLE_SAMPLES, Order

SHUFFLE_SHARDS, SHUFFLE_ENCODING = 4, 5  # purposes of the streams of random numbers; `loading.order` has the others


def encoding_order(samples: int, seed: int | None) -> NDArray[np.int64]:
    """Return the order in which the samples of a data set are encoded; without a seed, their own."""
    if seed is None:
        return np.arange(samples)
    raw = np.random.Philox(np.random.SeedSequence([seed, SHUFFLE_ENCODING])).random_raw(samples)
    return np.argsort(raw, kind="stable")


def shard_order(seed: int, epoch: int, shards: Sequence[int], *, shuffle: bool = True) -> list[int]:
    """Return the order in which an epoch reads `shards`."""
    if not shuffle:
        return list(shards)
    raw = np.random.Philox(np.random.SeedSequence([seed, SHUFFLE_SHARDS, epoch])).random_raw(len(shards))
    return [shards[i] for i in np.argsort(raw, kind="stable")]


class WindowedOrder(Order):
    """An `Order` whose samples come from a sliding window of shards.

    Args:
        buckets, global_batch, seed, shuffle, weights: as for `Order`.
        shards: maps an epoch to the shard of every sample, in the order of the data set; negative for samples without
            a shard.
        window: number of shards in the window, at least 1.

    Raises:
        DataError: as for `Order`, or the window is below 1.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        global_batch: int | Mapping[Bucket, int],
        seed: int,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        shards: Callable[[int], NDArray[np.integer]],
        window: int,
    ) -> None:
        super().__init__(buckets, global_batch=global_batch, seed=seed, shuffle=shuffle, weights=weights)
        if window < 1:
            raise DataError(f"window {window}: expected at least 1 shard")
        self.shards, self.window = shards, window
        self._places = lru_cache(maxsize=4 * len(self.buckets))(self._make_places)
        self._positions = lru_cache(maxsize=4)(self._make_positions)

    def restricted(self, epoch: int) -> bool:
        """Return whether the window holds fewer shards than the epoch."""
        return self.shuffle and self.window < len(np.unique(self.shards(epoch)))

    def fingerprint(self) -> int:
        """Return a number of 32 bits that changes when the order would: as for `Order`, plus window and shards."""
        crc = super().fingerprint()
        if not self.restricted(0):
            return crc
        return zlib.crc32(self.shards(0).astype("<i8").tobytes(), zlib.crc32(str(self.window).encode(), crc))

    def _make_positions(self, epoch: int) -> NDArray[np.int64]:
        """The position of every sample's shard in the epoch."""
        numbers, which = np.unique(self.shards(epoch), return_inverse=True)
        ordered = shard_order(self.seed, epoch, list(range(len(numbers))))
        position = np.empty(len(numbers), dtype=np.int64)
        position[ordered] = np.arange(len(numbers))
        return position[which]

    def _make_places(self, b: int, epoch: int) -> tuple[NDArray[np.integer], NDArray[np.float64]]:
        """The samples of bucket `b` in `epoch` in their order, and their places, in shards."""
        indices = self._members[b]
        if self._weights is not None:
            indices = np.repeat(indices, self._seen(b, epoch + 1) - self._seen(b, epoch))
        raw = self._raw(SHUFFLE_SAMPLES, epoch, b, len(indices))
        places = self._positions(epoch)[indices] + self.window * ((raw >> np.uint64(11)) / 2.0**53)
        order = np.argsort(places, kind="stable")
        return indices[order], places[order]

    def _make_sequence(self, b: int, epoch: int) -> NDArray[np.integer]:
        if not self.restricted(epoch):
            return super()._make_sequence(b, epoch)
        return self._places(b, epoch)[0]

    def _make_plan(self, epoch: int) -> NDArray[np.int64]:
        plan = super()._make_plan(epoch)
        if not self.restricted(epoch):
            return plan
        last = [(int(j) + 1) * self.sizes[b] - 1 - self._count(b, epoch) for b, j in plan]
        ends = [self._places(int(b), epoch)[1][i] for (b, _), i in zip(plan, last, strict=True)]
        # Ties are broken by bucket and number, so a bucket's batches keep their order.
        return plan[np.lexsort((plan[:, 1], plan[:, 0], np.array(ends)))]
