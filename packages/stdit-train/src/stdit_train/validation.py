"""The validation loss: fixed clips, fixed noise, evenly spread timesteps."""

from collections.abc import Callable

import torch
from torch import Tensor

from stdit_data.clip import ClipDataset

VALIDATION_CLIPS = 64


def validation_loss(
    dataset: ClipDataset, batch: int, loss: Callable[[Tensor, list[str], list[int], Tensor], Tensor]
) -> float:
    """Mean loss over the first clips of a dataset, which repeats where it is shorter.

    Args:
        dataset: clips.
        batch: clips at once.
        loss: of (video [b, ...], captions, which of the clips, levels [b] in 0..1), as [b].
    """
    losses = []
    for start in range(0, VALIDATION_CLIPS, batch):
        indices = list(range(start, min(start + batch, VALIDATION_CLIPS)))
        clips = [dataset.load(index % len(dataset), seed=0, epoch=0) for index in indices]
        video = torch.stack([clip.video for clip in clips])
        level = (torch.tensor(indices) + 0.5) / VALIDATION_CLIPS
        losses.append(loss(video, [clip.caption for clip in clips], indices, level))
    return torch.cat(losses).mean().item()
