"""The validation loss: fixed clips, fixed noise, evenly spread timesteps."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip, ClipDataset
from stdit_data.errors import ClipError, DataError
from stdit_train.distributed.world import Processes

log = logging.getLogger(__name__)

VALIDATION_CLIPS = 64


class ValidationClips:
    """A `ClipDataset` of the clips that a run of videos is validated on: the first 64 of another.

    As many again stand in for clips that can't be read, so that a broken file costs no run, and the loss is the same
    on every machine that finds the same files broken.

    Args:
        dataset: clips of one shape, nothing of them drawn at random; also `caption(index)`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.moments = dataset, getattr(dataset, "moments", False)
        self.own = range(len(dataset))[:VALIDATION_CLIPS]
        self.spare = range(len(dataset))[VALIDATION_CLIPS : 2 * VALIDATION_CLIPS]
        self._told: set[int] = set()

    def __len__(self) -> int:
        return len(self.own)

    def bucket(self, index: int) -> Bucket:
        """Their shape."""
        return self.dataset.bucket(index)

    @property
    def captions(self) -> list[str]:
        """Of all that may be read."""
        return [self.dataset.caption(index) for index in (*self.own, *self.spare)]

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        """A clip, or the one that stands in for it.

        Raises:
            DataError: not one can be read.
        """
        failed: ClipError | None = None
        for candidate in (index, *self.spare[index : index + 1], *self.own, *self.spare):
            try:
                return self.dataset.load(candidate, seed=0, epoch=0)
            except ClipError as error:
                failed = error
                if candidate not in self._told:
                    self._told.add(candidate)
                    log.warning("of the validation clips another stands in for %s", error)
        raise DataError(f"none of the {len(self)} validation clips can be read, the last: {failed}")


def validation_loss(
    dataset: ClipDataset,
    batch: int,
    loss: Callable[[Tensor, list[str], list[int], Tensor], Tensor],
    processes: Processes,
) -> float:
    """Mean loss over the first clips of a dataset, which repeats where it is shorter.

    Args:
        dataset: clips.
        batch: clips at once, over all processes.
        loss: of (video [b, ...], captions, which of the clips, levels [b] in 0..1), as [b].
        processes: share the clips; where these can't be shared evenly, some are computed twice and counted once.
    """
    share, batch = -(-VALIDATION_CLIPS // processes.data_ranks), max(1, batch // processes.data_ranks)
    own = [index % VALIDATION_CLIPS for index in range(processes.data_rank * share, (processes.data_rank + 1) * share)]
    losses = []
    for start in range(0, share, batch):
        indices = own[start : start + batch]
        clips = [dataset.load(index % len(dataset), seed=0, epoch=0) for index in indices]
        video = torch.stack([clip.video for clip in clips])
        level = (torch.tensor(indices) + 0.5) / VALIDATION_CLIPS
        losses.append(loss(video, [clip.caption for clip in clips], indices, level))
    return processes.joined(torch.cat(losses).cpu())[:VALIDATION_CLIPS].mean().item()
