"""Save the checkpoints of a run, in the background where wanted, and delete old ones."""

import errno
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from stdit_model.errors import reason
from stdit_train.checkpoint.format import begin_write, finish_write, root_cause, write_tensors
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.checkpoint.verify import CheckpointError, checkpoint_name, list_checkpoints, verify
from stdit_train.distributed.failures import PeerFailed
from stdit_train.distributed.world import World
from stdit_train.errors import CheckpointFailed, RunEnded

SPARE = 1 << 26  # free bytes below which a write that failed has filled the disk
PAUSES = (1.0, 5.0)  # seconds before a checkpoint is tried again
FULL = (errno.ENOSPC, errno.EDQUOT)
MARGIN = 16 * 2**20  # bytes that a checkpoint takes beside its tensors, with room for metrics and samples

log = logging.getLogger(__name__)


class CheckpointManager:
    """Saves and deletes the checkpoints of a run. Every process writes its shards, rank 0 the rest.

    Args:
        run: folder of the run.
        keep: number of the newest checkpoints to keep.
        keep_every: interval in steps of checkpoints to keep as well. [default: none]
        asynchronous: whether to write in the background, from a copy of the tensors.
        world: processes of the run.
    """

    def __init__(self, run: RunFolder, keep: int, keep_every: int | None, asynchronous: bool, world: World) -> None:
        self.run, self.folder, self.keep, self.keep_every = run, run.checkpoints, keep, keep_every
        self.asynchronous, self.world = asynchronous, world
        self._pending: Future[None] | None = None
        self._finisher = ThreadPoolExecutor(1, "checkpoint")

    @property
    def failed(self) -> bool:
        """Whether the checkpoint that is written in the background has failed on this process."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, last: bool = False) -> None:
        """Save a checkpoint, unless a whole one of this step exists.

        A fault of the disk is met by trying again, after each of `PAUSES`. If the checkpoint before this one was lost
        in the background, this one is written in the foreground.

        Args:
            step: steps done.
            tensors: see `named_tensors`.
            state: all other state, as JSON values.
            last: whether to return only when the checkpoint is on disk.

        Raises:
            CheckpointFailed: the disk is full, or keeps failing; earlier checkpoints are untouched.
        """
        lost = self._settle()
        final = self.folder / checkpoint_name(step)
        if self.world.broadcast_from_main(lambda: self._is_whole(final)):
            return
        asynchronous = self.asynchronous and not last and not lost
        for pause in (*PAUSES, None):
            error = self._write(final, tensors, state, asynchronous)
            if error is None:
                return
            passing = isinstance(error, (OSError, PeerFailed)) and not is_full(error) and pause is not None
            (ends,) = self.world.all_max(float(not passing))
            if ends or pause is None:
                raise self._explained(error) from error
            log.warning("step %d: the checkpoint could not be written (%s); trying again", step, _reason(error))
            time.sleep(pause)
            asynchronous = False

    def _write(
        self, final: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], asynchronous: bool
    ) -> Exception | PeerFailed | None:
        """Write a checkpoint, or begin to; return the error if it fails, on every process."""
        partial = final.with_name(f".{final.name}.partial")
        try:
            self.world.on_all(lambda: self._prepare(partial, tensors))
            if asynchronous:
                writing = self.world.on_all(lambda: self._copied(partial, tensors))
                self._pending = self._finisher.submit(self._seal_later, writing, partial, final, dict(state))
            else:
                write_tensors(partial, tensors, self.world.checkpoint_group)
                self.world.on_all(lambda: self._seal(partial, final, state))
        except BaseException as error:
            cause = error if isinstance(error, PeerFailed) else told(root_cause(error), self.folder)
            self._discard(partial)
            if not isinstance(cause, (Exception, PeerFailed)):  # a second Ctrl-C does not wait
                raise cause from error
            return cause
        return None

    def _copied(self, partial: Path, tensors: Mapping[str, Tensor]) -> Future[Any]:
        """Copy the tensors and begin to write the copy in the background.

        Raises:
            CheckpointFailed: they cannot be copied here. It is not tried again: the writers of the other processes wait
                for this one's by now.
        """
        try:
            return begin_write(partial, tensors, self.world.checkpoint_group)
        except Exception as error:
            if self.world.size == 1:
                raise
            raise CheckpointFailed(
                f"process {self.world.rank} cannot copy the tensors of a checkpoint ({_reason(error)}); "
                f"{_kept(self.newest())}. Resume with --resume and --set checkpoint_async=false, which needs no copy"
            ) from error

    def _settle(self) -> bool:
        """Wait for the checkpoint that is being written; return whether it was lost, on every process.

        Raises:
            CheckpointFailed: the disk is full.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        error = pending.exception()
        cause = None if error is None else told(root_cause(error), self.folder)
        full, lost = self.world.all_max(float(cause is not None and is_full(cause)), float(cause is not None))
        if full:
            raise self._explained(cause or PeerFailed(1))
        if lost:
            why = f" ({_reason(cause)})" if cause is not None else ""
            log.warning("a checkpoint could not be written in the background%s; saving again", why)
        return bool(lost)

    def newest(self) -> Path | None:
        """Return the newest checkpoint in place."""
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
        """Return whether this step is saved already; runs are reproducible, so the checkpoint would be the same."""
        try:
            verify(final, self.run.id)
        except (CheckpointError, OSError):
            return False
        return True

    def _prepare(self, partial: Path, tensors: Mapping[str, Tensor]) -> None:
        """Create an empty folder to write into, after checking that the disk has room."""
        if not self.world.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(tensors)
        for leftover in self.folder.glob(".step-*"):  # of a run that was killed, or a save that failed
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()

    def _check_space(self, tensors: Mapping[str, Tensor]) -> None:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + MARGIN
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"a checkpoint takes {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn the error of a full disk into RunEnded, whatever was being written."""
        try:
            yield
        except RunEnded:
            raise
        except Exception as error:
            cause = told(error, self.folder)
            if is_full(cause):
                raise disk_full(cause, self.newest()) from error
            raise

    def _explained(self, error: BaseException) -> BaseException:
        if is_full(error):
            return disk_full(error, self.newest())
        if not isinstance(error, OSError):
            return error
        kept = _kept(self.newest())
        return CheckpointFailed(
            f"cannot write a checkpoint into {self.folder} ({_reason(error)}); {kept}. Check the disk, then resume "
            "with --resume"
        )


def is_full(error: BaseException) -> bool:
    """Return whether a write failed because the disk is full."""
    return (isinstance(error, OSError) and error.errno in FULL) or "No space left on device" in str(error)


def told(error: BaseException, folder: Path) -> BaseException:
    """Return an error of torch's writer, which hides the system's, as that: by what is free, a full disk or a fault."""
    text = str(error)
    if not (isinstance(error, RuntimeError) and "inline_container" in text and "unexpected pos" in text):
        return error
    if shutil.disk_usage(folder).free < SPARE:
        return OSError(errno.ENOSPC, "No space left on device")
    return OSError(errno.EIO, "the disk failed while a checkpoint was being written")


def disk_full(error: BaseException, newest: Path | None) -> CheckpointFailed:
    """Return the error to raise when the disk is full."""
    kept = _kept(newest)
    return CheckpointFailed(f"the disk is full ({reason(error)}); {kept}. Free some space, then resume with --resume")


def _kept(newest: Path | None) -> str:
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"


def _reason(error: BaseException) -> str:
    return "another process failed" if isinstance(error, PeerFailed) else reason(error)
