"""The buckets of many samples as a column of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from stdit_data.buckets import Bucket


class BucketColumn(Sequence[Bucket]):
    """The bucket of each of many samples: a few shapes, and a number for each sample.

    Args:
        shapes: distinct buckets.
        numbers: for each sample the number of its bucket among `shapes`.
    """

    def __init__(self, shapes: Sequence[Bucket], numbers: NDArray[np.integer]) -> None:
        self.shapes, self.numbers = list(shapes), numbers

    @classmethod
    def of(cls, buckets: Iterable[Bucket]) -> BucketColumn:
        """Make a column of the samples' buckets, one by one."""
        if isinstance(buckets, BucketColumn):
            return buckets
        shapes: dict[Bucket, int] = {}
        numbers = np.array([shapes.setdefault(Bucket(*bucket), len(shapes)) for bucket in buckets], np.int64)
        return cls(list(shapes), numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Bucket:  # type: ignore[override]
        return self.shapes[int(self.numbers[index])]

    def take(self, indices: Sequence[int] | NDArray[np.integer]) -> BucketColumn:
        """Select samples."""
        return BucketColumn(self.shapes, self.numbers[np.asarray(indices, np.int64)])

    def counts(self) -> dict[Bucket, int]:
        """Count the samples of each bucket that has any, in the order of the buckets."""
        counted = np.bincount(self.numbers, minlength=len(self.shapes))
        return {shape: int(count) for shape, count in sorted(zip(self.shapes, counted, strict=True)) if count}
