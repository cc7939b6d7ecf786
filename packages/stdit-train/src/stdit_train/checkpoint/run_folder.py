"""The folder of a run: its settings, metadata, logs, checkpoints and results.

config.json  run.json  run.log  run.lock  metrics.jsonl  tensorboard/  loss.png  samples/  checkpoints/  pipeline/
"""

import contextlib
import json
import secrets
from pathlib import Path
from typing import Any

from stdit_data.storage.atomic import replace_text
from stdit_train.checkpoint.lock import HOLDER, LOCK
from stdit_train.checkpoint.verify import Checkpoint, CheckpointError, list_checkpoints, newest_whole, read_state
from stdit_train.config.load import (
    BEFORE,
    CURRICULUM_FILE,
    ConfigError,
    from_dict,
    has_settings,
    read_settings,
    to_dict,
)
from stdit_train.config.schema import TrainConfig


class RunFolder:
    """Paths and small files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.metadata_file = path / "run.json"
        self.log_file = path / "run.log"
        self.metrics_file = path / "metrics.jsonl"
        self.loss_plot = path / "loss.png"
        self.rejects_file = path / "rejects.jsonl"
        self.tensorboard = path / "tensorboard"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.pipeline = path / "pipeline"
        self.vae = path / "vae"

    def check_free(self) -> None:
        """Check that the folder is empty or does not exist.

        Raises:
            ConfigError: it is not empty, or a file.
        """
        if (file := next((place for place in (self.path, *self.path.parents) if place.is_file()), None)) is not None:
            raise ConfigError(f"{file} is a file: choose a folder with --out")
        if self.path.exists() and any(file.name not in (LOCK, HOLDER) for file in self.path.iterdir()):
            raise ConfigError(
                f"{self.path} is not empty: choose another folder with --out, or resume the run with --resume"
            )

    def create(self, config: TrainConfig) -> None:
        """Create the folder of a new run.

        Raises:
            ConfigError: it is not empty.
        """
        self.check_free()
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_config(config)
        assert self.id

    def write_anew(self, config: TrainConfig) -> None:
        """Create the folder again after it was deleted during the run, with the files that resuming needs."""
        self.tensorboard.mkdir(parents=True, exist_ok=True)  # TensorBoard's writer opens its file by name each time
        self.update_metadata(micro_batch=config.micro_batch)
        self.write_config(config)

    def write_config(self, config: TrainConfig) -> None:
        """Save the resolved configuration."""
        replace_text(self.config_file, json.dumps(to_dict(config), indent=1) + "\n")

    @property
    def id(self) -> str:
        """Return the random id that the run's checkpoints carry; it is created on first use."""
        if "id" not in self.metadata():
            self.update_metadata(id=secrets.token_hex(6))
        return str(self.metadata()["id"])

    @property
    def finished(self) -> bool:
        """Return whether the run reached its last step."""
        return "finished_at_step" in self.metadata()

    def metadata(self) -> dict[str, Any]:
        """Return the contents of run.json: id, micro_batch (as fitted to the machine), sessions, finished_at_step."""
        return read_settings(self.metadata_file) if has_settings(self.metadata_file) else {}

    def update_metadata(self, **values: Any) -> None:
        """Set values of run.json and keep the others."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.metadata_file, json.dumps({**self.metadata(), **values}) + "\n")

    def read_config(self) -> dict[str, Any]:
        """Read the configuration of the run as plain values.

        Raises:
            ConfigError: this is not a run folder, or its settings are not valid.
        """
        if not has_settings(self.config_file):
            what = "has no config.json" if self.path.exists() else "does not exist"
            raise ConfigError(f"{self.path} is not a run folder: it {what}")
        values = BEFORE | read_settings(self.config_file)
        try:
            from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{self.config_file}: {error}") from error
        return values

    def latest_checkpoint(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, None before the first; see `newest_whole`.

        Raises:
            CheckpointError: there are checkpoints, but none is whole and of this run.
        """
        return newest_whole(self.checkpoints, self.id)

    @property
    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint, whole or not."""
        return bool(list_checkpoints(self.checkpoints))

    def reached(self) -> tuple[int, float]:
        """Return the steps and the seconds of training at the last readable checkpoint; zeros before the first."""
        for checkpoint in reversed(list_checkpoints(self.checkpoints)):
            with contextlib.suppress(CheckpointError, OSError):  # resuming reports it, and uses the one before
                state = read_state(checkpoint)
                return state["step"], state["elapsed"]
        return 0, 0.0


def stage_folders(path: Path) -> list[Path]:
    """Return the run folders in a curriculum's folder, in order; for a run folder, itself."""
    if not has_settings(path / CURRICULUM_FILE):
        return [path]
    stages = [stage for stage in path.glob("[0-9]*-*") if (stage / "config.json").is_file()]
    return sorted(stages, key=lambda stage: int(stage.name.partition("-")[0]))


def free_run_folder(root: Path, name: str) -> Path:
    """Return the first of `root/name`, `root/name-2` and so on that does not exist yet."""
    path, number = root / name, 2
    while path.exists():
        path, number = root / f"{name}-{number}", number + 1
    return path


def newest_run(root: Path, name: str) -> Path:
    """Return the last of `root/name`, `root/name-2`, ..., to be resumed.

    Raises:
        ConfigError: there is none.
    """
    number, found = 2, root / name
    while (root / f"{name}-{number}").exists():
        found, number = root / f"{name}-{number}", number + 1
    if not found.exists():
        raise ConfigError(f"nothing to resume: no {found}; give the run's folder with --out")
    return found
