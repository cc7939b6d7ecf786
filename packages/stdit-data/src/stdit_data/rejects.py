"""Counts clips that can't be read, writes them down, and stops a run that loses too many."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from stdit_data.errors import ClipError, DataError

log = logging.getLogger(__name__)


class Rejects:
    """The bad clips of one rank.

    Args:
        path: JSON-lines file that each bad clip is appended to once, with index, path, reason, epoch and step. Lines
            of an earlier part of the run are kept and not repeated. None writes nothing.
        rank: ranks after the first write to a file of their own, since appends from several machines may get lost.
        max_share: of slots that may be bad, 0 to 1.
        judge_from: slots to see before the share is judged.
    """

    def __init__(self, path: str | Path | None, *, rank: int, max_share: float, judge_from: int) -> None:
        if not 0 <= max_share <= 1:
            raise DataError(f"max_reject_share {max_share}: expected a share from 0 to 1")
        self.path = Path(path) if path is not None else None
        if self.path is not None and rank:
            self.path = self.path.with_suffix(f".rank{rank}{self.path.suffix}")
        self.max_share, self.judge_from = max_share, judge_from
        self.slots = self.bad = 0
        self._written = self._read_back()

    def count(self, slots: int, rejects: list[tuple[int, ClipError]], *, epoch: int, step: int) -> None:
        """Takes in one step of this rank.

        Raises:
            DataError: more than the allowed share is bad.
        """
        self.slots += slots
        self.bad += len(rejects)
        for index, error in rejects:
            if error.path not in self._written:
                self._written.add(error.path)
                log.warning("rejected clip %d, %s", index, error)
                self._write(index, error, epoch, step)
        if rejects and self.slots >= self.judge_from and self.bad > self.max_share * self.slots:
            where = f"; all are listed in {self.path}" if self.path is not None else ""
            raise DataError(
                f"{self.bad} of {self.slots} clips could not be read, more than max_reject_share {self.max_share}; "
                f"the last: {rejects[-1][1]}{where}"
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
