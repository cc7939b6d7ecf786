"""A clip dataset some of whose captions are wrong: what careless captioning does to a model can be measured."""

import zlib
from dataclasses import replace
from typing import Any

import numpy as np

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip


class NoisyCaptions:
    """Gives a share of the clips the caption of another clip; which ones follows from (seed, index).

    Args:
        dataset: with right captions; `caption`, `path` and `about` ask for these of it, as `ShapesDataset` has them.
        share: of clips, 0..1.
        seed: any whole number from 0.
    """

    def __init__(self, dataset: Any, share: float, seed: int) -> None:
        self.dataset, self.share, self.seed = dataset, share, seed
        self.identity = zlib.crc32(repr((getattr(dataset, "identity", 0), share, seed)).encode())

    def __len__(self) -> int:
        return len(self.dataset)

    def bucket(self, index: int) -> Bucket:
        """Frames, height and width."""
        return self.dataset.bucket(index)

    def caption(self, index: int) -> str:
        """The clip's caption, perhaps a wrong one, without drawing it."""
        rng = np.random.default_rng([self.seed, index])
        if rng.random() >= self.share or len(self) == 1:
            return self.dataset.caption(index)
        return self.dataset.caption((index + 1 + int(rng.integers(len(self) - 1))) % len(self))

    def path(self, index: int) -> str:
        """A name for the clip."""
        return self.dataset.path(index)

    def settings(self) -> dict[str, Any]:
        """What determines every clip and its caption."""
        return {**self.dataset.settings(), "caption_noise": self.share, "caption_seed": self.seed}

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        """The clip, perhaps with a wrong caption."""
        return replace(self.dataset.load(index, seed=seed, epoch=epoch), caption=self.caption(index))
