"""Append what the packages log to a run's run.log."""

import logging
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from stdit_train.checkpoint.run_folder import RunFolder

PACKAGES = ("stdit_model", "stdit_data", "stdit_train")


class RunLog(logging.Handler):
    """A context in which records of level INFO and above are appended to a run's `run.log`.

    Lines are kept in memory while the run's folder has no configuration: before it is created, and after somebody has
    deleted it.

    Args:
        run: folder of the run.
    """

    def __init__(self, run: "RunFolder") -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.run = run
        self._lines: list[str] = []
        self._levels: dict[str, int] = {}

    def __enter__(self) -> Self:
        for name in PACKAGES:
            logger = logging.getLogger(name)
            self._levels[name] = logger.level
            if logger.getEffectiveLevel() > logging.INFO:
                logger.setLevel(logging.INFO)
            logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        for name, level in self._levels.items():
            logging.getLogger(name).removeHandler(self)
            logging.getLogger(name).setLevel(level)
        self.flush()
        self.close()

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record."""
        self._lines.append(self.format(record))
        self.flush()

    def flush(self) -> None:
        """Write the lines that are kept, if the folder is there and the disk takes them."""
        if not self._lines:
            return
        try:
            if not self.run.config_file.exists():
                return
            with self.run.log_file.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(f"{line}\n" for line in self._lines))
        except OSError:  # tried again with the next line; a checkpoint reports a full disk
            return
        self._lines.clear()
