"""The clips and timesteps of the validation loss."""

from collections.abc import Iterator

import torch
from torch import Tensor

from stdit_data.clip import Clip, ClipDataset
from stdit_train.data.holdout import VALIDATION_CLIPS
from stdit_train.distributed.world import World


def validation_batches(
    dataset: ClipDataset, batch: int, world: World
) -> Iterator[tuple[list[int], list[Clip], Tensor]]:
    """Yield this process's share of the validation clips as (numbers, clips, levels [b] in 0..1).

    Clip i of N has the level (i + 0.5) / N.

    Args:
        dataset: validation clips; a dataset shorter than N repeats.
        batch: clips at once in this process.
        world: processes that share the clips, each the same number of them.
    """
    share = -(-VALIDATION_CLIPS // world.dp_size)
    own = [index % VALIDATION_CLIPS for index in range(world.dp_rank * share, (world.dp_rank + 1) * share)]
    for start in range(0, share, batch):
        indices = own[start : start + batch]
        clips = [dataset.load(index % len(dataset), seed=0, epoch=0) for index in indices]
        yield indices, clips, (torch.tensor(indices) + 0.5) / VALIDATION_CLIPS
