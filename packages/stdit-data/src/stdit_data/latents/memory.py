"""Keep the latents of a deterministic data set in memory after the first epoch.

C latent channels, T frames, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip, ClipDataset
from stdit_data.transforms import to_float


class InMemoryLatents:
    """A `ClipDataset` of VAE moments in place of pixels, encoded on first use and kept in memory as bfloat16.

    Later epochs then cost no drawing, decoding or encoding.

    Args:
        dataset: clips [3, T, H, W] that don't depend on seed and epoch.
        encode: encodes a video [1, 3, T, H, W] in [-1, 1] to moments [1, 2C, T', H', W'].
        shape: from a clip's frames, height and width to T', H', W'.
    """

    moments = True  # clips hold moments instead of pixels

    def __init__(
        self, dataset: ClipDataset, encode: Callable[[Tensor], Tensor], shape: Callable[[Bucket], Bucket]
    ) -> None:
        self.dataset = dataset
        self.encode = encode
        self.shape = shape
        self._clips: dict[int, Clip] = {}  # with moments in bfloat16

    def __len__(self) -> int:
        return len(self.dataset)

    def bucket(self, index: int) -> Bucket:
        """Return the latents' frames, height and width."""
        return self.shape(self.dataset.bucket(index))

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        """Return the clip with moments [2C, T', H', W'] float32 as its video.

        Raises:
            ClipError: the clip can't be read.
        """
        clip = self._clips.get(index)
        if clip is None:
            clip = self.dataset.load(index, seed=seed, epoch=epoch)
            clip = replace(clip, video=self.encode(to_float(clip.video)[None])[0].to(torch.bfloat16))
            self._clips[index] = clip
        return replace(clip, video=clip.video.float())
