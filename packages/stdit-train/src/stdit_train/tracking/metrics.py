"""Write the metrics of a run to metrics.jsonl, TensorBoard and, on request, Weights & Biases."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit_train.config.load import ConfigError, to_dict
from stdit_train.config.schema import TrainConfig

if TYPE_CHECKING:
    from stdit_train.checkpoint.run_folder import RunFolder
from stdit_data.storage.atomic import replace_text


class Metrics:
    """Appends rows {"step": ..., name: value, ...}; rows after `step` are removed first.

    Args:
        file: path of metrics.jsonl.
        tensorboard: folder for TensorBoard's event files, None for none.
        step: steps done, of the checkpoint that is resumed.
        wandb: run of Weights & Biases (see `wandb_run`), None for none.
    """

    def __init__(self, file: Path, tensorboard: Path | None, step: int = 0, wandb: Any = None) -> None:
        self.file = file
        rows = [row for row in read_metrics(file) if row["step"] <= step]
        replace_text(file, "".join(_line(row) for row in rows))
        self._unwritten = ""  # lines that the disk did not take yet
        self._writer: Any = None
        self._wandb = wandb
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step, without those that are not finite, which JSON cannot hold.

        A line that could not be written is written with the next one.

        Raises:
            Exception: metrics.jsonl, TensorBoard or Weights & Biases failed; the others have the values.
        """
        values = _finite(values)
        _try_all(
            lambda: self._append(_line({"step": step, **values})),
            lambda: self._add_scalars(step, values),
            lambda: self._wandb is not None and self._wandb.log(values, step=step),
        )

    def close(self) -> None:
        """Write the lines that are left, flush and close TensorBoard and Weights & Biases.

        Raises:
            Exception: one of them failed; the others are closed.
        """
        _try_all(
            lambda: self._append(""),
            lambda: self._writer is not None and self._writer.close(),
            lambda: self._wandb is not None and self._wandb.finish(),
        )

    def _append(self, line: str) -> None:
        self._unwritten += line
        if not self._unwritten:
            return
        with self.file.open("a") as file:
            file.write(self._unwritten)
        self._unwritten = ""

    def _add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)


class NoMetrics:
    """Metrics of a rank that writes none."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TimestepBins:
    """Collects the mean loss in equal ranges of timesteps.

    Args:
        count: number of ranges of 0..1000.
    """

    def __init__(self, count: int) -> None:
        self.sums, self.counts = [0.0] * count, [0] * count

    def add(self, timesteps: Iterable[float], losses: Iterable[float]) -> None:
        """Add samples by their timesteps in 0..1000 and losses; those without a timestep (NaN) are left out."""
        for t, value in zip(timesteps, losses, strict=True):
            if math.isnan(t):
                continue
            part = min(int(t / 1000 * len(self.sums)), len(self.sums) - 1)
            self.sums[part] += value
            self.counts[part] += 1

    def take(self) -> dict[str, float]:
        """Return the mean losses of the ranges with samples, as {"loss_t0-100": ...}, and reset them."""
        edges = [round(1000 * i / len(self.sums)) for i in range(len(self.sums) + 1)]
        found = {
            f"loss_t{edges[i]}-{edges[i + 1]}": self.sums[i] / count for i, count in enumerate(self.counts) if count
        }
        self.sums, self.counts = [0.0] * len(self.sums), [0] * len(self.sums)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and counts."""
        return {"sums": list(self.sums), "counts": list(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, if it has the same number of ranges; sums that are not finite start anew."""
        if len(state["sums"]) == len(self.sums):
            pairs = zip(state["sums"], state["counts"], strict=True)
            kept = [(total, count) if math.isfinite(total) else (0.0, 0) for total, count in pairs]
            self.sums, self.counts = [total for total, _ in kept], [count for _, count in kept]


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _line(row: Mapping[str, float]) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _try_all(*acts: Callable[[], object]) -> None:
    """Call every function, and then raise the errors of those that failed."""
    errors = []
    for act in acts:
        try:
            act()
        except Exception as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ExceptionGroup("; ".join(f"{type(error).__name__}: {error}" for error in errors), errors)


def open_metrics(run: "RunFolder", config: TrainConfig, step: int) -> Metrics:
    """Open the metrics of a run that continues from a step."""
    wandb = wandb_run(config.wandb, run.id, run.path.name, run.path, to_dict(config)) if config.wandb else None
    return Metrics(run.metrics_file, run.tensorboard, step, wandb)


def check_wandb(project: str | None) -> None:
    """Check that a run can log to Weights & Biases, before anything is written.

    Asks for the API key on a terminal if nobody is signed in.

    Args:
        project: name of the project, None for a run that does not log there.

    Raises:
        ConfigError: wandb isn't installed, or nobody is signed in.
    """
    if project is None:
        return
    wandb = _wandb()
    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        wandb.login()
    except wandb.Error as error:
        raise _wandb_refused(error) from error


def wandb_run(project: str, run_id: str, name: str, folder: Path, settings: Mapping[str, Any]) -> Any:
    """Start or resume a run in Weights & Biases, with wandb's own settings for login and offline mode.

    Raises:
        ConfigError: wandb isn't installed, or refuses.
    """
    wandb = _wandb()
    quiet = wandb.Settings(console="off")  # a progress bar is no log
    try:
        return wandb.init(
            project=project,
            id=run_id,
            name=name,
            dir=str(folder),
            config=dict(settings),
            resume="allow",
            settings=quiet,
        )
    except wandb.Error as error:
        raise _wandb_refused(error) from error


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "--wandb: wandb is not installed: run `uv pip install wandb`, or install stdit-cli[wandb]"
        ) from error
    return wandb


def _wandb_refused(error: Exception) -> ConfigError:
    return ConfigError(
        f"--wandb: {error} Or set WANDB_MODE=offline, which logs into the run's folder, for `wandb sync`."
    )


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Read the rows of a metrics.jsonl, without incomplete lines, such as the last one of a run that was killed."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows
