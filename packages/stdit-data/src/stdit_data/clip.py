"""What one dataset entry becomes, and what the loader asks of a dataset.

C channels (3), T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.errors import ClipError, DataError

__all__ = ["Bucket", "Clip", "ClipDataset", "ClipError", "DataError"]


@dataclass(frozen=True, slots=True)
class Clip:
    """One training sample."""

    video: Tensor  # [C, T, H, W] float32 in [-1, 1]; moments of latents from a cache
    caption: str
    index: int  # position in the dataset
    fps: float  # frames a second as sampled: the source's rate over the interval
    span: tuple[float, float] = (0.0, 0.0)  # seconds from the source's first frame to the clip's first and last
    text: Tensor | None = None  # [L, D], the caption's text-encoder states without padding, where they are cached
    bucket: Bucket | None = None  # the clip's shape in pixels, where `video` holds something else


@runtime_checkable
class ClipDataset(Protocol):
    """Anything that the loader can read. `VideoDataset` and `ShapesDataset` are two.

    A dataset may also have `weights`, a sequence of one float per sample: how often each is seen per epoch (2 is
    twice, 0.5 every other epoch). Without it every sample is seen once. And it may have `identity`, an integer that
    changes when a position means another clip: a run that goes on with another one is refused.
    """

    def __len__(self) -> int: ...

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        """Reads sample `index`. All randomness comes from (seed, epoch, index). Called from several threads at once.

        Raises:
            ClipError: the clip can't be read or used.
        """
        ...

    def bucket(self, index: int) -> Bucket:
        """The shape of `load(index)` in frames and pixels. Cheap: the loader asks it of every sample once."""
        ...
