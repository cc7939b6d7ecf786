"""A clip dataset some of whose captions are wrong: what careless captioning does to a model can be measured."""

import zlib
from dataclasses import replace

import numpy as np

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip, ClipDataset


class NoisyCaptions:
    """Gives a share of the clips the caption of another clip; which ones follows from (seed, index).

    Args:
        dataset: with right captions.
        share: of clips, 0..1.
        seed: any whole number from 0.
    """

    def __init__(self, dataset: ClipDataset, share: float, seed: int) -> None:
        self.dataset, self.share, self.seed = dataset, share, seed
        self.identity = zlib.crc32(repr((getattr(dataset, "identity", 0), share, seed)).encode())

    def __len__(self) -> int:
        return len(self.dataset)

    def bucket(self, index: int) -> Bucket:
        """Frames, height and width."""
        return self.dataset.bucket(index)

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        """The clip, perhaps with a wrong caption."""
        clip = self.dataset.load(index, seed=seed, epoch=epoch)
        rng = np.random.default_rng([self.seed, index])
        if rng.random() >= self.share or len(self) == 1:
            return clip
        other = (index + 1 + int(rng.integers(len(self) - 1))) % len(self)
        return replace(clip, caption=self.dataset.load(other, seed=seed, epoch=epoch).caption)
