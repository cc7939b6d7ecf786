"""The validation loss: fixed clips, fixed noise, evenly spread timesteps."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from stdit_data.clip import ClipDataset
from stdit_train.data.holdout import VALIDATION_CLIPS
from stdit_train.distributed.world import World

log = logging.getLogger(__name__)


def validation_loss(
    dataset: ClipDataset,
    batch: int,
    loss: Callable[[Tensor, list[str], list[int], Tensor], Tensor],
    world: World,
) -> float:
    """Mean loss over the first clips of a dataset, which repeats where it is shorter.

    Args:
        dataset: clips.
        batch: clips at once, over all processes.
        loss: of (video [b, ...], captions, which of the clips, levels [b] in 0..1), as [b].
        world: Processes that share the clips. Where they do not divide evenly, some are computed twice and counted
            once.
    """
    share, batch = -(-VALIDATION_CLIPS // world.dp_size), max(1, batch // world.dp_size)
    own = [index % VALIDATION_CLIPS for index in range(world.dp_rank * share, (world.dp_rank + 1) * share)]
    losses = []
    for start in range(0, share, batch):
        indices = own[start : start + batch]
        clips = [dataset.load(index % len(dataset), seed=0, epoch=0) for index in indices]
        video = torch.stack([clip.video for clip in clips])
        level = (torch.tensor(indices) + 0.5) / VALIDATION_CLIPS
        losses.append(loss(video, [clip.caption for clip in clips], indices, level))
    return world.all_gather(torch.cat(losses).cpu())[:VALIDATION_CLIPS].mean().item()
