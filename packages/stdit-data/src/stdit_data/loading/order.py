"""Map (seed, epoch, batch) to the samples of a global batch: a pure function.

Rules
-----
- Every epoch shuffles each bucket's samples by (seed, epoch, bucket).
- A bucket's epochs form one endless sequence that is split into global batches. The tail of an epoch that fills no
  global batch is not dropped and not padded: it starts the bucket's first batch of the next epoch. Each sample is seen
  exactly once per epoch (or as often as its weight says), whatever the batch size.
- A batch belongs to the epoch of its last sample. The batches of an epoch, of all buckets, are shuffled by
  (seed, epoch).
- A sample carries the epoch that it was drawn in, for its own randomness by (seed, epoch, index).

Ranks and workers divide a global batch; they don't influence it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stdit_data.bucket_column import BucketColumn
from stdit_data.buckets import Bucket
from stdit_data.errors import DataError

WEIGHT_UNIT = 1000  # weights are counted in thousandths, so that sums over epochs are exact integers
SHUFFLE_SAMPLES, SHUFFLE_BATCHES, WEIGHT_PHASE = 1, 2, 3  # purposes of the streams of random numbers


class Slot(NamedTuple):
    """One sample of a global batch."""

    sample: int  # index in the data set
    epoch: int  # the epoch that it was drawn in


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The samples of one optimizer step."""

    epoch: int
    batch: int  # position within the epoch
    bucket: Bucket
    slots: tuple[Slot, ...]


class Order:
    """The order of the global batches of all epochs. It has no position.

    Args:
        buckets: the bucket of every sample, in the order of the data set.
        global_batch: samples per optimizer step over all ranks; one number, or one per bucket.
        seed: any whole number from 0.
        shuffle: shuffle samples and batches; without it samples keep their order and batches come bucket by bucket.
        weights: how often each sample is seen per epoch, rounded to thousandths; by default 1. A weight of 1.5 means
            once and twice in turn, starting at random.

    Attributes:
        buckets, sizes: the distinct buckets, sorted, and their global batch sizes.
        samples: number of samples.

    Raises:
        DataError: there are no samples, or a size, seed or weight is out of range.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        global_batch: int | Mapping[Bucket, int],
        seed: int,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not len(buckets):
            raise DataError("the dataset has no samples: expected at least one usable clip")
        if seed < 0:
            raise DataError(f"seed {seed}: expected a whole number from 0")
        self.seed, self.shuffle, self.samples = seed, shuffle, len(buckets)
        column = BucketColumn.of(buckets)
        self.buckets = list(column.counts())
        small = np.int32 if self.samples < 2**31 else np.int64
        self._members: list[NDArray[np.integer]] = [
            np.flatnonzero(column.numbers == column.shapes.index(bucket)).astype(small) for bucket in self.buckets
        ]
        self.sizes = [_size_of(bucket, global_batch) for bucket in self.buckets]
        self._weights = self._check_weights(weights)
        self._plan = lru_cache(maxsize=4)(self._make_plan)
        self._sequence = lru_cache(maxsize=4 * len(self.buckets))(self._make_sequence)
        self._count = lru_cache(maxsize=64 * len(self.buckets))(self._make_count)

    def batches(self, epoch: int) -> int:
        """Return the number of global batches in an epoch.

        It may be 0 and differs between epochs, by at most one per bucket without weights, as tails add up.
        """
        return len(self._plan(epoch))

    def batch(self, epoch: int, batch: int) -> GlobalBatch:
        """Return the global batch at position `batch` of `epoch`."""
        b, j = self._plan(epoch)[batch]
        size = self.sizes[b]
        start, stop = int(j) * size, (int(j) + 1) * size
        slots: list[Slot] = []
        while stop > start:  # from the end backwards: the batch ends in this epoch and may start in an earlier one
            before = self._count(b, epoch)
            first = max(start, before)
            if first < stop:
                drawn = self._sequence(b, epoch)[first - before : stop - before]
                slots[:0] = [Slot(int(sample), epoch) for sample in drawn]
                stop = first
            epoch -= 1
        owner = slots[-1].epoch
        return GlobalBatch(epoch=owner, batch=batch, bucket=self.buckets[b], slots=tuple(slots))

    def from_cursor(self, epoch: int, batch: int) -> Iterator[GlobalBatch]:
        """Yield all global batches from a position on, without end."""
        while True:
            if batch >= self.batches(epoch):
                epoch, batch = epoch + 1, 0
                continue
            yield self.batch(epoch, batch)
            batch += 1

    def fingerprint(self) -> int:
        """Return a number of 32 bits that changes when the order would, by buckets, sizes and weights."""
        crc = zlib.crc32(repr((self.samples, self.shuffle, self.buckets, self.sizes)).encode())
        for indices in self._members:
            crc = zlib.crc32(indices.astype("<i8").tobytes(), crc)
        if self._weights is not None:
            crc = zlib.crc32(self._weights.astype("<i8").tobytes(), crc)
        return crc

    def _check_weights(self, weights: Sequence[float] | None) -> NDArray[np.int64] | None:
        if weights is None:
            return None
        values = np.asarray(weights, dtype=np.float64)
        if values.shape != (self.samples,):
            raise DataError(f"weights: {values.size} for {self.samples} samples; expected one each")
        if not np.isfinite(values).all() or (values < 0).any():
            bad = int(np.flatnonzero(~(values >= 0) | ~np.isfinite(values))[0])
            raise DataError(f"weight {values[bad]} of sample {bad}: expected a number from 0")
        units = np.rint(values * WEIGHT_UNIT).astype(np.int64)
        if not units.any():
            raise DataError("weights: all are 0 (below 0.0005); expected at least one above 0")
        return None if (units == WEIGHT_UNIT).all() else units

    def _raw(self, purpose: int, epoch: int, b: int, count: int) -> NDArray[np.uint64]:
        # Raw bits of a bit generator are stable over numpy versions; Generator.permutation is not promised to be.
        # By the bucket's position, not its size: clips and their latents then have the same order.
        entropy = np.random.SeedSequence([self.seed, purpose, epoch, b + 1])
        return np.random.Philox(entropy).random_raw(count)

    def _seen(self, b: int, epoch: int) -> NDArray[np.int64]:
        """Count how often each member of bucket `b` is seen before `epoch`, up to a constant per member."""
        assert self._weights is not None
        members = self._members[b]
        phase = (self._raw(WEIGHT_PHASE, 0, b, len(members)) % WEIGHT_UNIT).astype(np.int64)
        seen: NDArray[np.int64] = (epoch * self._weights[members] + phase) // WEIGHT_UNIT
        return seen

    def _make_count(self, b: int, epoch: int) -> int:
        """Count the samples of bucket `b` in all epochs before `epoch`."""
        if self._weights is None:
            return epoch * len(self._members[b])
        return int(self._seen(b, epoch).sum())

    def _make_sequence(self, b: int, epoch: int) -> NDArray[np.integer]:
        """Order the samples of bucket `b` in `epoch`."""
        indices = self._members[b]
        if self._weights is not None:
            indices = np.repeat(indices, self._seen(b, epoch + 1) - self._seen(b, epoch))
        if not self.shuffle:
            return indices
        return indices[np.argsort(self._raw(SHUFFLE_SAMPLES, epoch, b, len(indices)), kind="stable")]

    def _make_plan(self, epoch: int) -> NDArray[np.int64]:
        """Order the batches that end in `epoch`: rows of (bucket, number of the batch in the bucket's sequence)."""
        rows = []
        for b, size in enumerate(self.sizes):
            numbers = np.arange(self._count(b, epoch) // size, self._count(b, epoch + 1) // size, dtype=np.int64)
            rows.append(np.stack([np.full_like(numbers, b), numbers], axis=1))
        plan = np.concatenate(rows)
        if self.shuffle:
            plan = plan[np.argsort(self._raw(SHUFFLE_BATCHES, epoch, -1, len(plan)), kind="stable")]
        return plan


def _size_of(bucket: Bucket, global_batch: int | Mapping[Bucket, int]) -> int:
    if isinstance(global_batch, Mapping):
        if bucket not in global_batch:
            known = ", ".join(str(key) for key in global_batch) or "none"
            raise DataError(f"global_batch: no size for bucket {bucket} (given: {known})")
        size = global_batch[bucket]
    else:
        size = global_batch
    if size < 1:
        raise DataError(f"global_batch {size}: expected at least 1")
    return int(size)
