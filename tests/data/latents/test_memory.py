"""Latents kept in memory: encoded once, each clip in its own shape."""

import torch
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.latents.memory import InMemoryLatents


def test_each_clip_is_encoded_once_and_has_its_own_shape() -> None:
    clips = ShapesDataset(frames=3, height=16, width=16, length=40, single_frames=0.5)
    encoded = 0

    def encode(video: Tensor) -> Tensor:
        nonlocal encoded
        encoded += 1
        return torch.nn.functional.avg_pool3d(video, (1, 8, 8)).repeat(1, 2, 1, 1, 1)

    latents = InMemoryLatents(clips, encode, lambda clip: Bucket(clip.frames, clip.height // 8, clip.width // 8))
    assert {latents.bucket(i) for i in range(40)} == {Bucket(3, 2, 2), Bucket(1, 2, 2)}
    for epoch in range(2):
        for index in range(10):
            clip = latents.load(index, seed=0, epoch=epoch)
            assert clip.video.shape == (6, *latents.bucket(index)) and clip.caption == clips.caption(index)
    assert encoded == 10
