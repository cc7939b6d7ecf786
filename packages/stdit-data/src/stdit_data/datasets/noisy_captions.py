"""Swap a share of captions, to measure how caption noise affects a model."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip, ClipDataset


class CaptionedDataset(ClipDataset, Protocol):
    """A `ClipDataset` that gives captions without loading clips, such as `ShapesDataset`."""

    def caption(self, index: int) -> str:
        """Return the clip's caption."""
        ...

    def path(self, index: int) -> str:
        """Return a name for the clip."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return what determines every clip."""
        ...


class NoisyCaptions:
    """A `ClipDataset` that gives a share of the clips the caption of another clip, chosen by (seed, index).

    Args:
        dataset: data set with correct captions.
        share: share of the clips, 0 to 1.
        seed: any whole number from 0.
    """

    def __init__(self, dataset: CaptionedDataset, share: float, seed: int) -> None:
        self.dataset, self.share, self.seed = dataset, share, seed
        self.identity = zlib.crc32(repr((getattr(dataset, "identity", 0), share, seed)).encode())

    def __len__(self) -> int:
        return len(self.dataset)

    def bucket(self, index: int) -> Bucket:
        """Return the clip's frames, height and width."""
        return self.dataset.bucket(index)

    def caption(self, index: int) -> str:
        """Return the clip's caption, which may be swapped, without loading the clip."""
        rng = np.random.default_rng([self.seed, index])
        if rng.random() >= self.share or len(self) == 1:
            return self.dataset.caption(index)
        return self.dataset.caption((index + 1 + int(rng.integers(len(self) - 1))) % len(self))

    def path(self, index: int) -> str:
        """Return a name for the clip."""
        return self.dataset.path(index)

    def settings(self) -> dict[str, Any]:
        """Return what determines every clip and its caption."""
        return {**self.dataset.settings(), "caption_noise": self.share, "caption_seed": self.seed}

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        """Load the clip, with its caption possibly swapped.

        Raises:
            ClipError: the clip can't be read.
        """
        return replace(self.dataset.load(index, seed=seed, epoch=epoch), caption=self.caption(index))
