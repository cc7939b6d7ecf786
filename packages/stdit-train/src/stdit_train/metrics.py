"""Where the numbers of a run go: metrics.jsonl and TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Metrics:
    """Appends rows {"step": ..., name: value, ...}; on resume, what lies after the checkpoint is taken back.

    Args:
        file: metrics.jsonl.
        tensorboard: folder for TensorBoard's event files; None for none.
        step: steps already done.
    """

    def __init__(self, file: Path, tensorboard: Path | None, step: int = 0) -> None:
        self.file = file
        rows = [row for row in read_metrics(file) if row["step"] <= step]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._writer: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._writer is not None:
            self._writer.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """All whole rows of a metrics.jsonl; a torn last line (the run was killed) is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
