"""Counts clips that can't be read, writes them down, and stops a run that loses too many."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stdit_data.errors import ClipError, DataError
from stdit_data.loading.order import Slot

log = logging.getLogger(__name__)


class Rejects:
    """The bad clips of one rank.

    Args:
        path: JSON-lines file that each bad clip is appended to once, with index, path, reason, epoch and step. Lines
            of an earlier part of the run are kept and not repeated. None writes nothing.
        samples: how many the dataset has.
        rank: ranks after the first write to a file of their own, since appends from several machines may get lost.
        max_share: of samples that may be bad, 0 to 1.
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
        """Takes in one step of this rank: the slots it had to read, and those that were bad.

        Raises:
            DataError: more than the allowed share of samples is bad. While some are still unseen: by more than three
                standard deviations of what the share would bring by chance, and by more than one clip.
        """
        self._seen[[slot.sample for slot in slots]] = True
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
            where = f"; all are listed in {self.path}" if self.path is not None else ""
            raise DataError(
                f"{bad} of {seen} clips can't be read, more than max_reject_share {self.max_share}; the last: "
                f"{rejects[-1][1]}{where}"
            )

    def _write(self, index: int, error: ClipError, epoch: int, step: int) -> None:
        if self.path is None:
            return
        line = {"index": index, "path": error.path, "reason": error.reason, "epoch": epoch, "step": step}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _read_back(self) -> set[str]:
        if self.path is None or not self.path.exists():
            return set()
        written = set()
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                written.add(json.loads(line)["path"])
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # a line cut short when the run was killed
        return written
