"""Run the shards of a task that are not finished yet, and divide shards among processes that don't communicate."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stdit_data.errors import DataError, FileError, StoreError, UserError
from stdit_data.workers.executors import Executor, Task

SHOWN = 3  # failures named in a message

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # done and in all, of this process


class Unavailable(DataError):
    """Something that all remaining shards need is lost, such as a server: the run ends at once."""


ENDS: tuple[type[DataError], ...] = (Unavailable, StoreError)


@dataclass(frozen=True)
class Share:
    """The rank of this process among those that divide the shards.

    Raises:
        DataError: the rank is not from 0 to `world` - 1.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise DataError(f"process {self.rank} of {self.world}: expected a number from 0 to {self.world - 1}")

    def of(self, shards: int) -> range:
        """Return the numbers of this process's shards."""
        return range(self.rank, shards, self.world)


def find_share() -> Share:
    """Return this process's share, from the environment of torchrun (RANK, WORLD_SIZE) or of a Slurm job array."""
    try:
        if "WORLD_SIZE" in os.environ:
            return Share(int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"]))
        if "SLURM_ARRAY_TASK_COUNT" in os.environ:
            first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
            step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
            rank = (int(os.environ["SLURM_ARRAY_TASK_ID"]) - first) // step
            return Share(rank, int(os.environ["SLURM_ARRAY_TASK_COUNT"]))
    except DataError:
        raise
    except (KeyError, ValueError) as error:
        raise DataError(f"RANK, WORLD_SIZE and SLURM_ARRAY_TASK_*: expected whole numbers ({error})") from None
    return Share()


def run_shards(
    task: Task,
    shards: Iterable[tuple[int, Any]],
    executor: Executor,
    finish: Callable[[int, Any], None],
    *,
    total: int,
    kept: str,
    ends: tuple[type[DataError], ...] = ENDS,
) -> None:
    """Run shards, and pass each result to `finish` as it comes, in any order.

    Args:
        task: the work; `run` gets the shards as they are given here.
        shards: numbers and shards; taken as workers become free.
        executor: where they run.
        finish: called in this process with a shard's number and result.
        total: number of shards in all, for messages.
        kept: where finished shards are kept, for messages.
        ends: errors of a shard that end the run; no further shard is begun, and those under way are still finished.
            After any other error the remaining shards are done first.

    Raises:
        DataError: one of `ends`, an error of `finish`, or at the end shards that failed, by name.
    """
    failed: dict[int, str] = {}
    ended: list[DataError] = []
    running: dict[Future[Any], int] = {}
    waiting = iter(shards)
    with executor.started(task) as submit:
        room = 2 * executor.width if executor.width > 1 else 1
        while True:
            while not ended and len(running) < room and (more := next(waiting, None)) is not None:
                running[submit(more[1])] = more[0]
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(future)
                error = _own(future.exception())
                if error is None:
                    try:
                        finish(number, future.result())
                    except DataError as failure:
                        ended.append(failure)
                elif isinstance(error, BrokenProcessPool):
                    reason = "(out of memory? fewer processes need less)"
                    ended.append(Unavailable(f"a worker process ended unexpectedly at {task.name} {reason}"))
                elif isinstance(error, ends):
                    ended.append(error)
                elif isinstance(error, UserError):
                    failed[number] = str(error)
                elif isinstance(error, Exception):  # whatever it is, the other shards are still worth doing
                    logger.debug("shard %d", number, exc_info=error)
                    failed[number] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                else:
                    raise error
    if ended:
        with resumable(kept):
            raise ended[0]
    if failed:
        listed = "; ".join(f"shard {number}: {failed[number]}" for number in sorted(failed)[:SHOWN])
        more_failed = f"; and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
        raise DataError(
            f"{len(failed)} of {total} shards failed ({listed}{more_failed}); "
            f"the finished ones are kept in {kept}, the same command does the others"
        )


@contextmanager
def resumable(kept: str) -> Iterator[None]:
    """Add to the error of a disk, store, server or worker how to resume."""
    try:
        yield
    except (FileError, Unavailable) as error:
        message = f"{error}; finished shards are kept in {kept}; run the same command again to resume"
        raise type(error)(message) from None


def _own(error: BaseException | None) -> BaseException | None:
    """Return the error that a task raised, which Ray wraps in one of its own."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
