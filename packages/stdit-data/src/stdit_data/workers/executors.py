"""The places to run a task's shards: this process, a pool of processes, or a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, Protocol

from stdit_data.errors import DataError

logger = logging.getLogger(__name__)


class Task(Protocol):
    """Work on shards, each independent of the others. It is pickled to the processes that run it."""

    @property
    def name(self) -> str:
        """Return its name, for messages."""

    @property
    def gpus(self) -> float:
        """Return the number of GPUs per worker of a Ray cluster."""

    @property
    def has_model(self) -> bool:
        """Return whether `open` loads a model that is worth keeping."""

    def open(self) -> Any:
        """Load what a process needs once, such as a model."""

    def run(self, shard: Any, opened: Any) -> Any:
        """Return the result for one shard."""


Submit = Callable[[Any], "Future[Any]"]


RETRIES = 3  # of a shard whose Ray worker was lost
STARTS = 3  # attempts to start Ray here; it gives up after 30 s, which a busy machine may need the first time
SLOW = "timed out during startup"  # what it says then


class Executor(Protocol):
    """Runs a task on shards."""

    width: int  # shards at a time
    separate: bool  # whether they run in other processes, which the task is pickled to

    def started(self, task: Task) -> Any:
        """Return a context manager in which shards can be submitted; its value is a `Submit`."""


class Inline:
    """Runs shards in this process, one after another."""

    width = 1
    separate = False

    @contextmanager
    def started(self, task: Task) -> Iterator[Submit]:
        """Open the task once."""
        opened = task.open()

        def submit(shard: Any) -> Future[Any]:
            future: Future[Any] = Future()
            try:
                future.set_result(task.run(shard, opened))
            except Exception as error:
                future.set_exception(error)
            return future

        yield submit


class Processes:
    """A pool of processes on this machine, each of which opens the task once.

    They end at once, in the middle of their shards, when the block that submits them raises, as at Ctrl-C, or when this
    process ends, however it does.
    """

    separate = True

    def __init__(self, width: int) -> None:
        if width < 1:
            raise DataError(f"processes {width}: expected at least 1")
        self.width = width

    @contextmanager
    def started(self, task: Task) -> Iterator[Submit]:
        """Spawn the workers rather than fork them, since PyTorch's and FFmpeg's threads do not survive a fork."""
        context = multiprocessing.get_context("spawn")
        end, held = context.Pipe(duplex=False)  # open at the other end for as long as the workers are to work
        pool = ProcessPoolExecutor(
            self.width, mp_context=context, initializer=_begin, initargs=(pickle.dumps(task), end)
        )
        try:
            yield lambda shard: pool.submit(_run, shard)
        except BaseException:
            held.close()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            held.close()
            end.close()


class RayCluster:
    """A Ray cluster, or with "local" one that is started here and ends with the run.

    Asks for no more workers than the cluster has CPUs and GPUs for: on a small machine, actors that wait for each
    other's resources would hang.

    Args:
        address: of the cluster's head node, "auto", or "local".
        width: workers; as many as fit by default.
    """

    separate = True

    def __init__(self, address: str, width: int | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Read when Ray is imported: otherwise it starts its workers by `uv run` in a copy of the working directory.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            import ray
        except ImportError:
            raise DataError("Ray is not installed; install stdit-data[ray]") from None
        self.ray, self.address, self.wanted = ray, address, width
        self.width = width or 1

    @contextmanager
    def started(self, task: Task) -> Iterator[Submit]:
        """Use an actor per worker for tasks with a model, tasks for others. Shards of a lost worker are run again."""
        ray = self.ray
        self._connect()
        try:
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            if task.has_model and not task.gpus and any(machine.get("GPU") for machine in machines):
                logger.warning("%s runs on CPUs, though Ray has GPUs; --gpus 1 takes one per worker", task.name)
            room = sum(_room(machine, task.gpus) for machine in machines)
            if room < 1:
                needed = f"{task.gpus:g} GPU and a CPU" if task.gpus else "a CPU"
                raise DataError(f"Ray at {self.address}: {task.name} needs {needed}, which none of its machines has")
            self.width = min(self.wanted or room, room)
            needs = {"num_cpus": 1, "num_gpus": task.gpus}
            if task.has_model:
                yield self._actors(task, needs)
            else:
                shared = ray.put(task)
                once = ray.remote(**needs, max_retries=RETRIES)(_run_once)
                yield lambda shard: once.remote(shared, shard).future()
        finally:
            ray.shutdown()

    def _connect(self) -> None:
        local: dict[str, Any] = {}
        if self.address == "local":
            local = {"num_cpus": self.wanted or os.cpu_count(), "include_dashboard": False}
        for left in reversed(range(STARTS)):
            try:
                self.ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, **local)
                return
            except Exception as error:  # Ray raises plain ones too
                if not (local and left and SLOW in str(error)):
                    raise DataError(f"Ray at {self.address}: {' '.join(str(error).split())[:200]}") from None
                self.ray.shutdown()

    def _actors(self, task: Task, needs: dict[str, Any]) -> Submit:
        remote: Any = self.ray.remote(**needs, max_restarts=RETRIES, max_task_retries=RETRIES)(_Actor)
        actors: list[Any] = [remote.remote(task) for _ in range(self.width)]
        waiting = dict.fromkeys(actors, 0)

        def submit(shard: Any) -> Future[Any]:
            actor = min(actors, key=lambda one: waiting[one])
            waiting[actor] += 1
            future: Future[Any] = actor.run.remote(shard).future()

            def finished(_: object) -> None:
                waiting[actor] -= 1

            future.add_done_callback(finished)
            return future

        return submit


def _room(resources: Mapping[str, float], gpus: float) -> int:
    """Return how many workers fit on one machine of a cluster, of which each takes a CPU and so many GPUs.

    A worker does not take parts of two GPUs: of those that take 0.6, one fits on each.
    """
    cpus, found = int(resources.get("CPU", 0)), resources.get("GPU", 0)
    if not gpus:
        return cpus
    return min(cpus, int(found) * int(1 / gpus) if gpus < 1 else int(found // gpus))


class _Actor:
    """One worker of a Ray cluster with its model."""

    def __init__(self, task: Task) -> None:
        self.task, self.opened = task, task.open()

    def run(self, shard: Any) -> Any:
        return self.task.run(shard, self.opened)


def _run_once(task: Task, shard: Any) -> Any:
    return task.run(shard, task.open())


_worker: dict[str, Any] = {}  # of a pool's process: the pickled task; then the task, and what it opened


def _begin(pickled: bytes, end: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # else a Ctrl-C would end its shard and begin the next
    Thread(target=_exit_at, args=(end,), daemon=True).start()
    _worker["pickled"] = pickled


def _exit_at(end: Connection) -> None:
    """Wait until the process that started this one has closed its end of a pipe, or is gone; then exit."""
    with suppress(EOFError, OSError):
        end.recv_bytes()
    os._exit(1)


def _run(shard: Any) -> Any:
    # Opened here rather than at the start of the process, where an error would only break the pool.
    if "opened" not in _worker:
        _worker["task"] = pickle.loads(_worker["pickled"])  # imports what it needs, torch for one
        _worker["opened"] = _worker["task"].open()
    return _worker["task"].run(shard, _worker["opened"])


def worker_device() -> str:
    """Return the device for this process: one of the GPUs in turn if there are any, otherwise the CPU."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return "cpu"
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    # Processes of a pool count from 1; the one that the user started has no number.
    place: tuple[int, ...] = getattr(multiprocessing.current_process(), "_identity", ())
    return f"cuda:{(int(local) + (place[-1] - 1 if place else 0)) % count}"
