"""Rank, size and messages of the processes of a command; one process has the same interface.

`World.from_env` reads what torchrun sets, and imports no torch, so that every command can ask for its rank at once.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from stdit_train.distributed.failures import GRACE, PeerFailed, is_connection_lost
from stdit_train.distributed.launch import check_gpus
from stdit_train.errors import ConfigError, RunEnded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stdit_train.config.schema import TrainConfig
    from stdit_train.distributed.mesh import ParallelMesh

T = TypeVar("T")

PATIENCE = 20.0  # seconds for the others to come, after an error, for a last checkpoint


class World:
    """A single process.

    Attributes:
        rank, size: number of this process, and number of processes.
        local_rank: number of this process on its machine: the index of its GPU.
        dp_rank, dp_size: number of this process's share of the global batch, and number of shares. Processes that
            share a clip have the same `dp_rank`.
        mesh: process groups of a run; None for one process, and before `with_mesh`.
        checkpoint_group: process group for writing checkpoints, apart from the messages of a step.
    """

    rank, size, local_rank = 0, 1, 0
    dp_rank, dp_size = 0, 1
    mesh: "ParallelMesh | None" = None
    checkpoint_group: Any = None
    _meeting_group: Any = None

    @staticmethod
    def from_env() -> "World":
        """Return the world that RANK, WORLD_SIZE and LOCAL_RANK describe; a single process without them.

        Raises:
            ConfigError: they are not numbers, or the rank is not below the size.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return World()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = [os.environ.get(name, "0") for name in names]
        if not all(value.isdigit() for value in values) or int(values[0]) >= int(values[1]):
            found = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            raise ConfigError(f"{found}: expected numbers, and RANK below WORLD_SIZE")
        rank, size, local_rank = map(int, values)
        return DistributedWorld(rank, size, local_rank) if size > 1 else World()

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Return whether the weights of models are sharded over `mesh`."""
        return self.mesh is not None

    @property
    def parallel(self) -> dict[str, int] | None:
        """The parallel dimensions of the run by name: world_size, replicate and sequence; None without a mesh."""
        return asdict(self.mesh.dims) if self.mesh is not None else None

    # -- set-up ----------------------------------------------------------------------------------------------------

    def connect(self, timeout: timedelta | None = None) -> Self:
        """Initialize torch.distributed, which messages need, unless it is already initialized.

        Args:
            timeout: how long a message waits for the other processes. [default: torch's, 30 minutes]

        Raises:
            ConfigError: there are more processes on this machine than GPUs.
        """
        return self

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(self, *error: object) -> None:
        """Leave the process group; after an error, without waiting for the other processes."""

    def with_mesh(self, config: "TrainConfig") -> "World":
        """Return this world with the process groups of a run.

        Raises:
            ConfigError: the processes do not fit the run; see `stdit_train.distributed.dims.ParallelDims`.
        """
        return self

    def device(self) -> "torch.device":
        """Return the device of this process."""
        from stdit_train.hardware import find_device

        return find_device()

    def select_gpu(self) -> None:
        """Make this process's GPU the current one of torch, where several processes have one each."""

    # -- messages --------------------------------------------------------------------------------------------------

    def broadcast_from_main(self, compute: Callable[[], T]) -> T:
        """Call a function on rank 0 and return its result on every rank; its error ends all of them."""
        return compute()

    def on_all(self, act: Callable[[], T]) -> T:
        """Call a function on every rank and return its own result; an error on one rank ends all of them."""
        return act()

    def all_max(self, *numbers: float) -> tuple[float, ...]:
        """Return the maximum over all ranks of each number."""
        return numbers

    def gather_numbers(self, numbers: list[float]) -> list[list[float]]:
        """Return the numbers of every rank, by rank; all ranks pass equally many."""
        return [[float(number) for number in numbers]]

    def all_gather(self, part: "Tensor") -> "Tensor":
        """Concatenate tensors [..., n] of equal shape in the order of `dp_rank`: [..., dp_size * n]."""
        return part

    def collect(self, part: "Tensor", count: int) -> "Tensor | None":
        """Concatenate tensors [n, ...] of equal shape from the first `count` data-parallel ranks, on rank 0.

        Returns:
            [count * n, ...] on rank 0, None on the others.
        """
        return part

    def all_arrive(self) -> bool:
        """Return whether every rank calls this within `PATIENCE`, so that they can exchange messages."""
        return True

    def first_result(self, results: Iterable[str | None]) -> str | None:
        """Return the first result that is not None, of the lowest rank that has one."""
        return next(filter(None, results), None)

    def gather(self, items: list[T]) -> list[list[T]] | None:
        """Return the items of every rank, by rank, on rank 0; None on the others."""
        return [items]


class DistributedWorld(World):
    """One of several processes, as torchrun or `stdit train --nproc` start them.

    Messages that are not tensors of the model go over gloo, on the CPU, so that they do not wait for a GPU.
    """

    def __init__(self, rank: int, size: int, local_rank: int = 0, mesh: "ParallelMesh | None" = None) -> None:
        self.rank, self.size, self.local_rank, self.mesh = rank, size, local_rank, mesh
        self.dp_rank, self.dp_size = rank, size
        if mesh is not None:
            import torch.distributed as dist

            self.dp_rank, self.dp_size = mesh.dp_rank, mesh.dims.data
            self.checkpoint_group = dist.new_group(backend="gloo")
            # Creating a group takes all processes within its timeout, which is short here: they have just met in the
            # one before, however late some of them came.
            self._meeting_group = dist.new_group(timeout=timedelta(seconds=PATIENCE), backend="gloo")

    def connect(self, timeout: timedelta | None = None) -> Self:
        """Initialize torch.distributed with gloo for CPU tensors and NCCL for GPU tensors."""
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            self.select_gpu()
            store = _store_of_restart()
            group = {"store": store, "rank": self.rank, "world_size": self.size} if store is not None else {}
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timeout, **group)
        return self

    def __exit__(self, *error: object) -> None:
        import torch.distributed as dist

        if error[0] is None:
            dist.barrier()
            dist.destroy_process_group()
        elif isinstance(error[1], PeerFailed):
            time.sleep(GRACE)
        elif isinstance(error[1], Exception) and is_connection_lost(error[1]):
            time.sleep(GRACE)  # the process that failed reports why, and the launcher then ends this one
            raise RunEnded(
                f"the connection to another process of the run is lost ({error[1]}): see what that one printed, and "
                "resume with --resume"
            ) from error[1]

    def with_mesh(self, config: "TrainConfig") -> World:
        """Return this world with the process groups of a run; every process must call this."""
        from stdit_train.distributed.dims import node_size, parallel_dims
        from stdit_train.distributed.mesh import build_mesh

        node = node_size() or 0
        least, most = self.all_max(-node, node)
        mesh = build_mesh(parallel_dims(config, self.size, node if -least == most else 1), self.device())
        return DistributedWorld(self.rank, self.size, self.local_rank, mesh)

    def device(self) -> "torch.device":
        """Return the GPU with the local rank, or the CPU on a machine without GPUs."""
        import torch

        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def select_gpu(self) -> None:
        """Make the GPU with the local rank the current one of torch."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank)

    def broadcast_from_main(self, compute: Callable[[], T]) -> T:
        """Call a function on rank 0 and broadcast its pickled result; the other ranks raise PeerFailed if it fails."""
        import torch
        import torch.distributed as dist

        answer: list[Any] = [None, False]
        failure = None
        if self.is_main:
            try:
                answer = [compute(), True]
            except (Exception, SystemExit) as error:
                failure = error
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if failure is not None:
            raise failure
        if not answer[1]:
            raise PeerFailed(1)
        return cast(T, answer[0])

    def on_all(self, act: Callable[[], T]) -> T:
        """Call a function on every rank; ranks where it succeeded raise PeerFailed if it failed on another one."""
        from torch.distributed.checkpoint import CheckpointException  # a BaseException

        result, failure = None, None
        try:
            result = act()
        except (Exception, CheckpointException) as error:
            failure = error
        if self.all_max(float(failure is not None)) == (0.0,):
            return result  # type: ignore[return-value]
        raise failure or PeerFailed(1)

    def all_max(self, *numbers: float) -> tuple[float, ...]:
        """All-reduce the maximum of each number, as float64."""
        import torch
        import torch.distributed as dist

        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return tuple(values.tolist())

    def gather_numbers(self, numbers: list[float]) -> list[list[float]]:
        """Gather the numbers of every rank, as float64 in one message."""
        import torch
        import torch.distributed as dist

        own = torch.tensor(numbers, dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def all_gather(self, part: "Tensor") -> "Tensor":
        """Gather tensors from all ranks and keep one of each group that shares clips."""
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts[:: self.size // self.dp_size], dim=-1)

    def collect(self, part: "Tensor", count: int) -> "Tensor | None":
        """Send a tensor of the CPU to rank 0 from the first data-parallel ranks."""
        import torch
        import torch.distributed as dist

        together = self.size // self.dp_size  # processes that share a clip have neighbouring ranks
        if not self.is_main:
            if self.rank % together == 0 and self.dp_rank < count:
                dist.send(part.contiguous(), 0)
            return None
        parts = [part]
        for rank in range(1, count):
            parts.append(torch.empty_like(part))
            dist.recv(parts[-1], rank * together)
        return torch.cat(parts)

    def all_arrive(self) -> bool:
        """Wait for the other ranks, in a group that has no other messages."""
        import torch.distributed as dist

        try:
            dist.monitored_barrier(self._meeting_group, timeout=timedelta(seconds=PATIENCE))
        except RuntimeError:  # some wait elsewhere, or have ended
            return False
        return True

    def first_result(self, results: Iterable[str | None]) -> str | None:
        """Gather the first result of each rank and return the first that is not None."""
        import torch.distributed as dist

        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, next(filter(None, results), None))
        return next(filter(None, found), None)

    def gather(self, items: list[T]) -> list[list[T]] | None:
        """Gather pickled items on rank 0."""
        import torch.distributed as dist

        lists: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(items, lists)
        return lists


def _store_of_restart() -> Any:
    """Return the store through which processes that torchrun started again on one machine meet; else None.

    Without `--rdzv-backend c10d` torchrun keeps its store over restarts, with the addresses of processes that ended.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or os.environ.get("GROUP_WORLD_SIZE") != "1":  # machines count their restarts differently
        return None
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    return PrefixStore(f"restart_{attempt}", store)
