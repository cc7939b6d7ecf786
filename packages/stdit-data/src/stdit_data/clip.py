"""A training sample, and the interface of data sets.

C channels (3), T frames, H height, W width; L text tokens, D width of the text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from stdit_data.buckets import Bucket


@dataclass(frozen=True, slots=True)
class Clip:
    """One training sample."""

    video: Tensor  # [C, T, H, W] float32 in [-1, 1], or uint8; from a cache the moments [2C, T', H', W'] of latents
    caption: str
    index: int  # in the data set
    fps: float  # frames per second of the clip: the source's rate over the interval
    span: tuple[float, float] = (0.0, 0.0)  # seconds from the source's first frame to the clip's first and last
    text: Tensor | None = None  # [L, D], the caption's text-encoder states without padding, from a cache
    bucket: Bucket | None = None  # the clip's shape in pixels, if `video` holds latents


@runtime_checkable
class ClipDataset(Protocol):
    """The interface of data sets that the loader can read, such as `VideoDataset` and `ShapesDataset`.

    A data set may also have `weights`, a sequence of floats that say how often each sample is seen per epoch (2 is
    twice, 0.5 every other epoch; by default once), `identity`, an integer that changes when the list of clips does: a
    run is not resumed with another one; and `bucket_column`, the buckets of all samples as a `BucketColumn`.
    """

    def __len__(self) -> int: ...

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        """Read sample `index`; all randomness comes from (seed, epoch, index). Called from several threads at once.

        Raises:
            ClipError: the clip can't be read or used.
        """
        ...

    def bucket(self, index: int) -> Bucket:
        """Return the shape of sample `index` in frames and pixels; fast, as the loader calls it for every sample."""
        ...
