"""The processes of a run on many: who they are, what they agree on, and what each of them builds.

Messages between them that are no tensors of the model go over gloo, on the CPU, so that no GPU is waited for.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from stdit_model import STDiT
from stdit_train.config.load import ConfigError
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.mesh import ParallelMesh, build_mesh, parallel_dims
from stdit_train.distributed.parallelize import gathered, parallel_model
from stdit_train.distributed.sharded_weights import copy_shards, fill, fresh
from stdit_train.distributed.world import World, mean_over_processes

T = TypeVar("T")


CPU = torch.device("cpu")


class PeerFailed(SystemExit):
    """Another process failed, and says why itself; this one has nothing to add."""


def join() -> World:
    """The processes that torchrun, or `stdit train --nproc`, started and that this is one of; alone, this one.

    Raises:
        ConfigError: more processes on this machine than it has GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return World()
    if torch.cuda.is_available():
        check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return DistributedWorld()


def check_devices(processes: int) -> None:
    """Each process has a GPU of its own, where there are any.

    Raises:
        ConfigError: there are fewer.
    """
    devices = torch.cuda.device_count()
    if 0 < devices < processes:
        raise ConfigError(f"{processes} processes on a machine with {devices} GPUs: take at most {devices} (--nproc)")


class DistributedWorld(World):
    """This process among several. torch.distributed must be initialised.

    Args:
        mesh: the groups of a run; None before it has any.
    """

    sharded = True

    def __init__(self, mesh: ParallelMesh | None = None) -> None:
        self.mesh = mesh
        self.number, self.count = dist.get_rank(), dist.get_world_size()
        self.first = self.number == 0
        if mesh is not None:
            self.data_rank, self.data_ranks = mesh.data_rank, mesh.grouping.data
            self.checkpointing_group = dist.new_group(backend="gloo")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            dist.barrier()
            dist.destroy_process_group()

    def grouped(self, config: TrainConfig) -> World:
        return DistributedWorld(build_mesh(parallel_dims(config, self.count), self.device()))

    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU

    def model(self, arguments: Mapping[str, Any], config: TrainConfig) -> STDiT:
        """In shards, which are gathered in bfloat16 unless the precision is fp32; no process ever has the whole."""
        assert self.mesh is not None
        model = parallel_model(
            dict(arguments),
            self.mesh,
            self.device(),
            dtype=None if config.precision == "fp32" else torch.bfloat16,
            checkpointing=config.activation_checkpointing,
            compiled=config.compile,
        )
        fill(model, fresh(arguments, config.seed))
        return model

    def average(self, model: STDiT) -> STDiT:
        assert self.mesh is not None
        arguments = STDiT.arguments(model.config)
        average = parallel_model(arguments, self.mesh, self.device())
        copy_shards(model, average)
        return average

    def outfit(self, module: STDiT, config: TrainConfig) -> None:
        """`model` did."""

    def whole(self, model: STDiT) -> STDiT | None:
        weights = gathered(model)
        if not self.first:
            return None
        arguments = STDiT.arguments(model.config)
        with torch.device("meta"):
            made = STDiT(**arguments)
        made.load_state_dict(weights, assign=True)
        return made.eval().requires_grad_(False)

    def decided(self, decide: Callable[[], T]) -> T:
        answer: list[Any] = [None, False]
        failure = None
        if self.first:
            try:
                answer = [decide(), True]
            except (Exception, SystemExit) as error:
                failure = error
        dist.broadcast_object_list(answer, src=0, device=CPU)
        if failure is not None:
            raise failure
        if not answer[1]:
            raise PeerFailed(1)
        return answer[0]

    def together(self, act: Callable[[], T]) -> T:
        result, failure = None, None
        try:
            result = act()
        except (Exception, CheckpointException) as error:
            failure = error
        if self.largest(float(failure is not None)) == (0.0,):
            return result  # type: ignore[return-value]
        raise failure or PeerFailed(1)

    def largest(self, *numbers: float) -> tuple[float, ...]:
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return tuple(values.tolist())

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        return mean_over_processes(values, CPU)

    def joined(self, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts[:: self.count // self.data_ranks], dim=-1)

    def any(self, found: Iterable[str | None]) -> str | None:
        answers: list[Any] = [None] * self.count
        dist.all_gather_object(answers, next(filter(None, found), None))
        return next(filter(None, answers), None)
