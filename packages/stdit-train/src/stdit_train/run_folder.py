"""The folder of a run: what was asked for, what happened, what came out.

config.json  metrics.jsonl  tensorboard/  loss.png  samples/  checkpoints/  pipeline/
"""

import json
from pathlib import Path
from typing import Any

from stdit_train.checkpoint import list_checkpoints
from stdit_train.config import ConfigError, TrainConfig, from_dict, to_dict


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
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
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
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

    def write_config(self, config: TrainConfig) -> None:
        """Save the resolved configuration."""
        self.config_file.write_text(json.dumps(to_dict(config), indent=1) + "\n")

    def read_config(self) -> dict[str, Any]:
        """The configuration that the run was started with, as plain values.

        Raises:
            ConfigError: this is no run folder.
        """
        if not self.config_file.is_file():
            raise ConfigError(f"{self.path} is not a run folder (no config.json): nothing to resume there")
        values = json.loads(self.config_file.read_text())
        from_dict(values)
        return values

    def latest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint, None before the first."""
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None


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
