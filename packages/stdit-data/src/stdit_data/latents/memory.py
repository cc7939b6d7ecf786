""""""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip, ClipDataset


class InMemoryLatents:
    """Wraps a dataset in which nothing is drawn at random: `load` gives VAE moments in place of pixels.

    Each clip is encoded when it is first asked for and kept in memory as bfloat16, so that
    an epoch after the first costs no drawing, decoding or encoding.

    Args:
        dataset: clips [3, T, H, W]; its clips must not depend on seed and epoch.
        encode: video [1, 3, T, H, W] to moments [1, 2C, T', H', W'].
        shape: (T', H', W').
    """

    moments = True  # what a clip's video is

    def __init__(self, dataset: ClipDataset, encode: Callable[[Tensor], Tensor], shape: tuple[int, int, int]) -> None:
        self.dataset = dataset
        self.encode = encode
        self.shape = Bucket(*shape)
        self._clips: dict[int, Clip] = {}  # their videos are moments, bfloat16

    def __len__(self) -> int:
        return len(self.dataset)

    def bucket(self, index: int) -> Bucket:
        """Latent frames, height and width."""
        return self.shape

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        """The clip with moments [2C, T', H', W'] as its video."""
        clip = self._clips.get(index)
        if clip is None:
            clip = self.dataset.load(index, seed=seed, epoch=epoch)
            clip = replace(clip, video=self.encode(clip.video[None])[0].to(torch.bfloat16))
            self._clips[index] = clip
        return replace(clip, video=clip.video.float())
