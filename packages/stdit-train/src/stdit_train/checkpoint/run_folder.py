"""The folder of a run: what was asked for, what happened, what came out.

config.json  run.json  metrics.jsonl  tensorboard/  loss.png  samples/  checkpoints/  pipeline/
"""

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stdit_data.files import replace_text
from stdit_train.checkpoint.format import newest_whole
from stdit_train.config.load import CURRICULUM_FILE, ConfigError, from_dict, read_settings, to_dict
from stdit_train.config.schema import TrainConfig


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.notes_file = path / "run.json"
        self.metrics_file = path / "metrics.jsonl"
        self.loss_plot = path / "loss.png"
        self.rejects_file = path / "rejects.jsonl"
        self.tensorboard = path / "tensorboard"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.pipeline = path / "pipeline"

    def check_free(self) -> None:
        """Nothing is here yet.

        Raises:
            ConfigError: there is something in it already.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file: choose a folder with --out")
        if self.path.exists() and any(self.path.iterdir()):
            raise ConfigError(
                f"{self.path} is not empty: choose another folder with --out, or go on with it by --resume"
            )

    def create(self, config: TrainConfig) -> None:
        """Make a new run folder.

        Raises:
            ConfigError: there is something in it already.
        """
        self.check_free()
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_config(config)
        assert self.id

    def write_anew(self, config: TrainConfig) -> None:
        """Make the folder of a run that is under way, with what resuming it takes, after somebody has deleted it."""
        self.tensorboard.mkdir(parents=True, exist_ok=True)  # its writer opens its file by name, each time
        self.note(micro_batch=config.micro_batch)
        self.write_config(config)

    def write_config(self, config: TrainConfig) -> None:
        """Save the resolved configuration."""
        replace_text(self.config_file, json.dumps(to_dict(config), indent=1) + "\n")

    @property
    def id(self) -> str:
        """What tells this run's checkpoints from those of another; made when first asked for."""
        if "id" not in self.notes():
            self.note(id=secrets.token_hex(6))
        return self.notes()["id"]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return "finished_at_step" in self.notes()

    def notes(self) -> dict[str, Any]:
        """What a run keeps beside its settings: id, micro_batch (as fitted to the machine), finished_at_step."""
        return read_settings(self.notes_file) if self.notes_file.exists() else {}

    def note(self, **values: Any) -> None:
        """Add to the notes."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(self.notes_file, json.dumps({**self.notes(), **values}) + "\n")

    def read_config(self) -> dict[str, Any]:
        """The configuration that the run was started with, as plain values.

        Raises:
            ConfigError: this is no run folder.
        """
        if not self.config_file.is_file():
            what = "has no config.json" if self.path.exists() else "does not exist"
            raise ConfigError(f"{self.path} is not a run folder: it {what}")
        values = read_settings(self.config_file)
        try:
            from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{self.config_file}: {error}") from error
        return values

    def latest_checkpoint(self, said: Callable[[str], None] = lambda line: None) -> Path | None:
        """The newest whole checkpoint, None before the first; `said` is told of those that are refused.

        Raises:
            CheckpointError: there are some, but none is whole and of this run.
        """
        return newest_whole(self.checkpoints, self.id, said)

    def reached(self) -> tuple[int, float]:
        """Steps done, and the seconds that they took, as of the last checkpoint; zeros before the first."""
        checkpoint = self.latest_checkpoint()
        if checkpoint is None:
            return 0, 0.0
        state = json.loads((checkpoint / "state.json").read_text())
        return state["step"], state["elapsed"]


def stage_folders(path: Path) -> list[Path]:
    """The run folders that a schedule's folder holds so far, in order; a run folder itself stands for itself."""
    if not (path / CURRICULUM_FILE).is_file():
        return [path]
    stages = [stage for stage in path.glob("[0-9]*-*") if (stage / "config.json").is_file()]
    return sorted(stages, key=lambda stage: int(stage.name.partition("-")[0]))


def free_run_folder(root: Path, name: str) -> Path:
    """`root/name`, or `root/name-2` and so on: the first that does not exist yet."""
    path, number = root / name, 2
    while path.exists():
        path, number = root / f"{name}-{number}", number + 1
    return path


def newest_run(root: Path, name: str) -> Path:
    """The last of `root/name`, `root/name-2`, ... to be resumed.

    Raises:
        ConfigError: there is none.
    """
    number, found = 2, root / name
    while (root / f"{name}-{number}").exists():
        found, number = root / f"{name}-{number}", number + 1
    if not found.exists():
        raise ConfigError(f"nothing to resume: no {found}; give the run's folder with --out")
    return found
