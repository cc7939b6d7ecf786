"""A step over shards of a manifest, and the places to run it: this process, a pool of processes, or a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from stdit_data.errors import DataError

Reject = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """The output of a step for one shard: the rows that it passes on, and those that it dropped, with reasons."""

    rows: pa.Table
    rejects: list[Reject] = field(default_factory=list)


class Step(Protocol):
    """One operation on a manifest. It is pickled to the processes that run it."""

    name: str

    @property
    def shard_rows(self) -> int:
        """Return the number of rows per shard."""

    @property
    def gpus(self) -> float:
        """Return the number of GPUs per worker of a Ray cluster."""

    @property
    def has_model(self) -> bool:
        """Return whether `open` loads a model that is worth keeping."""

    def settings(self) -> Mapping[str, Any]:
        """Return everything besides the rows that the results depend on, as JSON."""

    def schema(self, given: pa.Schema) -> pa.Schema:
        """Return the columns of the rows that the step passes on."""

    def open(self) -> Any:
        """Load what a process needs once, such as a model."""

    def run(self, shard: pa.Table, opened: Any) -> Result:
        """Return the result for one shard."""


Submit = Callable[[pa.Table], "Future[Result]"]


RETRIES = 3  # of a shard whose Ray worker was lost


class Executor(Protocol):
    """Runs a step on shards."""

    width: int  # shards at a time

    def started(self, step: Step) -> Any:
        """Return a context manager in which shards can be submitted; its value is a `Submit`."""


class Inline:
    """Runs shards in this process, one after another."""

    width = 1

    @contextmanager
    def started(self, step: Step) -> Iterator[Submit]:
        """Open the step once."""
        opened = step.open()

        def submit(shard: pa.Table) -> Future[Result]:
            future: Future[Result] = Future()
            try:
                future.set_result(step.run(shard, opened))
            except Exception as error:
                future.set_exception(error)
            return future

        yield submit


class Processes:
    """A pool of processes on this machine, each of which opens the step once."""

    def __init__(self, width: int) -> None:
        if width < 1:
            raise DataError(f"workers {width}: expected at least 1")
        self.width = width

    @contextmanager
    def started(self, step: Step) -> Iterator[Submit]:
        """Spawn the workers rather than fork them, since PyTorch's and FFmpeg's threads do not survive a fork."""
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.width, mp_context=context, initializer=_open, initargs=(step,))
        try:
            yield lambda shard: pool.submit(_run, shard)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class RayCluster:
    """A Ray cluster, or with "local" one that is started here and ends with the run.

    Asks for no more workers than the cluster has CPUs and GPUs for: on a small machine, actors that wait for each
    other's resources would hang.

    Args:
        address: of the cluster's head node, "auto", or "local".
        width: workers; as many as fit by default.
    """

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
    def started(self, step: Step) -> Iterator[Submit]:
        """Use an actor per worker for steps with a model, tasks for others. Shards of a lost worker are run again."""
        ray = self.ray
        self._connect()
        try:
            resources = ray.cluster_resources()
            room = int(resources.get("CPU", 1))
            if step.gpus:
                room = min(room, int(resources.get("GPU", 0) / step.gpus))
            if room < 1:
                raise DataError(f"Ray at {self.address}: {step.name} needs {step.gpus:g} GPU, it has none")
            self.width = min(self.wanted or room, room)
            needs = {"num_cpus": 1, "num_gpus": step.gpus}
            if step.has_model:
                yield self._actors(step, needs)
            else:
                shared = ray.put(step)
                task = ray.remote(**needs, max_retries=RETRIES)(_run_once)
                yield lambda shard: task.remote(shared, shard).future()
        finally:
            ray.shutdown()

    def _connect(self) -> None:
        local: dict[str, Any] = {}
        if self.address == "local":
            local = {"num_cpus": self.wanted or os.cpu_count(), "include_dashboard": False}
        try:
            self.ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except Exception as error:  # Ray raises plain ones too, as when a node does not start in time
            raise DataError(f"Ray at {self.address}: {' '.join(str(error).split())[:200]}") from None

    def _actors(self, step: Step, needs: dict[str, Any]) -> Submit:
        remote: Any = self.ray.remote(**needs, max_restarts=RETRIES, max_task_retries=RETRIES)(_Actor)
        actors: list[Any] = [remote.remote(step) for _ in range(self.width)]
        waiting = dict.fromkeys(actors, 0)

        def submit(shard: pa.Table) -> Future[Result]:
            actor = min(actors, key=lambda one: waiting[one])
            waiting[actor] += 1
            future: Future[Result] = actor.run.remote(shard).future()

            def finished(_: object) -> None:
                waiting[actor] -= 1

            future.add_done_callback(finished)
            return future

        return submit


class _Actor:
    """One worker of a Ray cluster with its model."""

    def __init__(self, step: Step) -> None:
        self.step, self.opened = step, step.open()

    def run(self, shard: pa.Table) -> Result:
        return self.step.run(shard, self.opened)


def _run_once(step: Step, shard: pa.Table) -> Result:
    return step.run(shard, step.open())


_worker: dict[str, Any] = {}  # of a pool's process: the step, and what it opened


def _open(step: Step) -> None:
    _worker["step"] = step


def _run(shard: pa.Table) -> Result:
    # Opened here rather than at the start of the process, where an error would only break the pool.
    if "opened" not in _worker:
        _worker["opened"] = _worker["step"].open()
    result: Result = _worker["step"].run(shard, _worker["opened"])
    return result
