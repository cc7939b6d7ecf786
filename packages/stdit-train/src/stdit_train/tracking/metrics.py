"""Where the numbers of a run go: metrics.jsonl, TensorBoard and, by option, Weights & Biases."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stdit_train.config.load import ConfigError, to_dict
from stdit_train.config.schema import TrainConfig

if TYPE_CHECKING:
    from stdit_train.checkpoint.run_folder import RunFolder
from stdit_data.files import replace_text


class Metrics:
    """Appends rows {"step": ..., name: value, ...}; on resume, what lies after the checkpoint is taken back.

    Args:
        file: metrics.jsonl.
        tensorboard: folder for TensorBoard's event files; None for none.
        step: steps already done.
        wandb: a run of Weights & Biases (`wandb_run`), None for none.
    """

    def __init__(self, file: Path, tensorboard: Path | None, step: int = 0, wandb: Any = None) -> None:
        self.file = file
        rows = [row for row in read_metrics(file) if row["step"] <= step]
        replace_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        self._writer: Any = None
        self._wandb = wandb
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
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Flush."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoMetrics:
    """Metrics of a process that writes none."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TimestepBins:
    """Mean loss by timestep, since it was last asked for.

    Args:
        count: equal parts of 0..1000.
    """

    def __init__(self, count: int) -> None:
        self.sums, self.counts = [0.0] * count, [0] * count

    def add(self, timestep: Tensor, loss: Tensor) -> None:
        """Samples' timesteps in 0..1000 and losses, both [b] on the CPU."""
        for t, value in zip(timestep.tolist(), loss.tolist(), strict=True):
            part = min(int(t / 1000 * len(self.sums)), len(self.sums) - 1)
            self.sums[part] += value
            self.counts[part] += 1

    def take(self) -> dict[str, float]:
        """The means of the parts that were seen, by name, and start anew."""
        edges = [round(1000 * i / len(self.sums)) for i in range(len(self.sums) + 1)]
        found = {
            f"loss_t{edges[i]}-{edges[i + 1]}": self.sums[i] / count for i, count in enumerate(self.counts) if count
        }
        self.sums, self.counts = [0.0] * len(self.sums), [0] * len(self.sums)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"sums": list(self.sums), "counts": list(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; other bins start anew."""
        if len(state["sums"]) == len(self.sums):
            self.sums, self.counts = list(state["sums"]), list(state["counts"])


def open_metrics(run: "RunFolder", config: TrainConfig, step: int) -> Metrics:
    """All that a run is to write, from a step on."""
    wandb = wandb_run(config.wandb, run.id, run.path.name, run.path, to_dict(config)) if config.wandb else None
    return Metrics(run.metrics_file, run.tensorboard, step, wandb)


def check_wandb(project: str | None) -> None:
    """That a run can log to this project of Weights & Biases (None for none), before anything is made for it.

    Asks for the key where there is a terminal and nobody is signed in.

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
    """Start, or go on with, this run in Weights & Biases; signed in and online or not as wandb itself is set.

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
    """All whole rows of a metrics.jsonl; what is none, as the last line of a run that was killed, is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows
