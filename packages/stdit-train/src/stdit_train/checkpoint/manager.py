"""Writes the checkpoints of a run while it goes on, and keeps those that are to be kept."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from stdit_train.checkpoint.format import (
    CheckpointError,
    begin_write,
    checkpoint_name,
    finish_write,
    list_checkpoints,
    root_cause,
    verify,
)
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.distributed.world import World
from stdit_train.errors import RunEnded

FULL = (errno.ENOSPC, errno.EDQUOT)
MARGIN = 16 * 2**20  # bytes that a checkpoint takes beside its tensors, with room for metrics and samples


class CheckpointManager:
    """The checkpoints of one run. Every process writes its shards; the first does the rest.

    Args:
        run: whose they are.
        keep: how many of the newest are kept.
        keep_every: those of every so many steps are kept as well; None for none.
        asynchronous: write while training goes on, from a copy of the tensors.
        world: Processes of the run.
    """

    def __init__(self, run: RunFolder, keep: int, keep_every: int | None, asynchronous: bool, world: World) -> None:
        self.run, self.folder, self.keep, self.keep_every = run, run.checkpoints, keep, keep_every
        self.asynchronous, self.world = asynchronous, world
        self._pending: Future[None] | None = None
        self._finisher = ThreadPoolExecutor(1, "checkpoint")
        if world.is_main:
            for leftover in self.folder.glob(".step-*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, last: bool = False) -> None:
        """Save a step; one that is there already, whole, is left alone. The last is on disk when this returns.

        Raises:
            RunEnded: the disk is full; earlier checkpoints are untouched.
            OSError: another fault of the disk.
        """
        self.wait()
        final = self.folder / checkpoint_name(step)
        if self.world.broadcast_from_main(lambda: self._is_whole(final)):
            return
        partial = self.folder / f".{final.name}.partial"
        try:
            self.world.on_all(lambda: self._prepare(partial, tensors))
            group = self.world.checkpoint_group
            writing = begin_write(partial, tensors, asynchronous=self.asynchronous and not last, group=group)
            if writing is not None:
                self._pending = self._finisher.submit(self._seal_later, writing, partial, final, dict(state))
                return
            self.world.on_all(lambda: self._seal(partial, final, state))
        except BaseException as error:
            self._discard(partial)
            raise self._explained(error) from error

    def wait(self) -> None:
        """Until what is being written is in place.

        Raises:
            RunEnded, OSError: it could not be (see `save`).
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                self.world.on_all(pending.result)
            except BaseException as error:
                raise self._explained(error) from error

    def newest(self) -> Path | None:
        """The last checkpoint in place."""
        found = list_checkpoints(self.folder)
        return found[-1] if found else None

    def _seal_later(self, writing: Future[Any], partial: Path, final: Path, state: dict[str, Any]) -> None:
        try:
            writing.result()
            self._seal(partial, final, state)
        except BaseException:
            self._discard(partial)
            raise

    def _discard(self, partial: Path) -> None:
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)

    def _seal(self, partial: Path, final: Path, state: Mapping[str, Any]) -> None:
        if not self.world.is_main:
            return
        finish_write(partial, final, {"run": self.run.id, **state})
        for old in list_checkpoints(self.folder)[: -self.keep]:
            if not self.keep_every or int(old.name[5:]) % self.keep_every:
                removed = old.with_name(f".{old.name}.removed")  # at once, so that a kill leaves no half of it
                shutil.rmtree(removed, ignore_errors=True)
                old.rename(removed)
                shutil.rmtree(removed)

    def _is_whole(self, final: Path) -> bool:
        """Whether this step is saved already: the run is the same to the bit, so the checkpoint would be too."""
        try:
            verify(final, self.run.id)
        except CheckpointError:
            return False
        return True

    def _prepare(self, partial: Path, tensors: Mapping[str, Tensor]) -> None:
        """An empty folder to write into, on a disk with room for it."""
        if not self.world.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(tensors)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

    def _check_space(self, tensors: Mapping[str, Tensor]) -> None:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + MARGIN
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"a checkpoint takes {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """A disk that is full within is said, whatever was being written."""
        try:
            yield
        except RunEnded:
            raise
        except Exception as error:
            if is_full(error):
                raise disk_full(error, self.newest()) from error
            raise

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, dcp.CheckpointException):
            error = root_cause(error)
        return disk_full(error, self.newest()) if is_full(error) else error


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; of torch's own writer, which doesn't say, any failed write."""
    text = str(error)
    silent = isinstance(error, RuntimeError) and "inline_container" in text and "unexpected pos" in text
    return silent or (isinstance(error, OSError) and error.errno in FULL) or "No space left on device" in text


def disk_full(error: BaseException, newest: Path | None) -> RunEnded:
    """What to say about it."""
    kept = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
    detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0].strip()
    return RunEnded(f"the disk is full ({detail}); {kept}. Free some space and go on with --resume")
