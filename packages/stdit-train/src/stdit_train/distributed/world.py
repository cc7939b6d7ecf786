"""The processes of a run, as the trainer sees them. Here: one, which has nobody to agree with.

`stdit_train.distributed._distributed` has those of a run on many. Whatever takes all of them says so here, in one
process too, so that the trainer reads the same; in one process it changes nothing, not a bit.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stdit_model import STDiT
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.parallelize import outfit
from stdit_train.hardware import find_device

T = TypeVar("T")


class World:
    """One process.

    Attributes:
        first: whether this is the one that prints and writes.
        number, count: of this process, of all.
        data_rank, data_ranks: this process's share of the global batch, of how many; several may share one.
        sharded: whether a model's weights are DTensors.
        checkpointing_group: the processes as the writer of checkpoints has them, apart from the step's messages.
    """

    first = True
    number, count = 0, 1
    data_rank, data_ranks = 0, 1
    sharded = False
    checkpointing_group: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave; not waiting for the others if there was an error."""

    def grouped(self, config: TrainConfig) -> "World":
        """The same, in the groups of a run.

        Raises:
            ConfigError: they don't fit it; see `stdit_train.distributed.mesh.ParallelDims`.
        """
        return self

    # -- what is put on a model ------------------------------------------------------------------------------------

    def device(self) -> torch.device:
        """Of this process."""
        return find_device()

    def model(self, arguments: Mapping[str, Any], config: TrainConfig) -> STDiT:
        """The transformer of a run, initialised from its seed, on this process's device."""
        torch.manual_seed(config.seed)
        return STDiT(**arguments).to(self.device())

    def average(self, model: STDiT) -> STDiT:
        """A float32 copy of a model that isn't trained."""
        return copy.deepcopy(model).float()

    def outfit(self, module: STDiT, config: TrainConfig) -> None:
        """Put checkpointing and compilation on what is called in training."""
        outfit(module, config.activation_checkpointing, config.compile)

    def whole(self, model: STDiT) -> STDiT | None:
        """A model with all its weights, on the first process; None on the others."""
        return model

    # -- what all agree on -----------------------------------------------------------------------------------------

    def decided(self, decide: Callable[[], T]) -> T:
        """What the first process decides, on all; the others don't try. Its error ends them all."""
        return decide()

    def together(self, act: Callable[[], T]) -> T:
        """Do it on every process; an error on one ends them all."""
        return act()

    def largest(self, *numbers: float) -> tuple[float, ...]:
        """Of each number the largest of all processes."""
        return numbers

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each number over all processes."""
        return values

    def joined(self, part: Tensor) -> Tensor:
        """Parts [..., n] of equal size, of every share of the global batch in its order: [..., data_ranks * n]."""
        return part

    def any(self, found: Iterable[str | None]) -> str | None:
        """The first that is not None, of this process or else of the next."""
        return next(filter(None, found), None)


def mean_over_processes(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each number over all processes, which all give the same names; one message."""
    totals = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return dict(zip(values, (totals / dist.get_world_size()).tolist(), strict=True))
