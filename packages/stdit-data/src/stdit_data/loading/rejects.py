"""Count and record clips that can't be read, and stop a run with too many of them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stdit_data.errors import ClipError, DataError
from stdit_data.loading.order import Slot
from stdit_data.storage.files import json_line, wrap_errors

log = logging.getLogger(__name__)


class Rejects:
    """The unreadable clips of one rank.

    Args:
        path: JSON-lines file that each clip is appended to once, with index, path, reason, epoch and step. Existing
            lines are kept and not repeated; where it cannot be written, a warning says so. None to write no file.
        samples: number of samples of the data set.
        rank: ranks after the first write to files of their own, since appends from several machines may get lost.
        max_share: largest share of samples that may be unreadable, 0 to 1.

    Raises:
        DataError: `max_share` is out of range, or the file can't be read.
    """

    def __init__(self, path: str | Path | None, *, samples: int, rank: int, max_share: float) -> None:
        if not 0 <= max_share <= 1:
            raise DataError(f"max_reject_share {max_share}: expected a share from 0 to 1")
        self.path = Path(path) if path is not None else None
        if self.path is not None and rank:
            self.path = self.path.with_suffix(f".rank{rank}{self.path.suffix}")
        self.max_share = max_share
        self._seen = np.zeros(samples, dtype=bool)
        self._bad = np.zeros(samples, dtype=bool)
        self._written = self._read_back()

    def count(self, slots: Sequence[Slot], rejects: Sequence[tuple[int, ClipError]], *, epoch: int, step: int) -> None:
        """Count one step of this rank.

        Args:
            slots: the slots that the rank read.
            rejects: index and error of those that could not be read.
            epoch, step: position in the run, to record.

        Raises:
            DataError: more than `max_share` of the samples can't be read. Until all samples have been seen, a margin
                of three standard deviations, and at least one clip, allows for chance.
        """
        read = [slot.sample for slot in slots]
        self._seen[read], self._bad[read] = True, False  # a clip counts by its last reading
        if not rejects:
            return
        for index, error in rejects:
            self._bad[index] = True
            if error.path not in self._written:
                self._written.add(error.path)
                log.warning("rejected clip %d, %s", index, error)
                self._write(index, error, epoch, step)
        seen, bad, total = int(self._seen.sum()), int(self._bad.sum()), len(self._seen)
        chance = 0.0
        if seen < total and self.max_share > 0:
            chance = max(1.0, 3 * math.sqrt(self.max_share * (1 - self.max_share) * seen * (1 - seen / total)))
        if bad > self.max_share * seen + chance:
            where = f"; they are listed in {self.path}" if self.path is not None else ""
            raise DataError(
                f"{bad} of {seen} clips can't be read, more than max_reject_share {self.max_share}; the last: "
                f"{rejects[-1][1]}{where}"
            )

    def _write(self, index: int, error: ClipError, epoch: int, step: int) -> None:
        if self.path is None:
            return
        line = {"index": index, "path": error.path, "reason": error.reason, "epoch": epoch, "step": step}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json_line(line))
        except OSError as error_of_disk:
            log.warning("rejected clip %d is not listed in %s (%s)", index, self.path, error_of_disk.strerror)

    def _read_back(self) -> set[str]:
        if self.path is None or not self.path.exists():
            return set()
        written = set()
        with wrap_errors(str(self.path)):
            lines = self.path.read_bytes().splitlines()
        for line in lines:
            try:
                written.add(json.loads(line)["path"])
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short when the run was killed
        return written
