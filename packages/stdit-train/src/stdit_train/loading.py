"""From what a user calls a checkpoint to a pipeline on the best device here."""

from pathlib import Path

import torch

from stdit_model import STDiTPipeline
from stdit_train.components import quiet_libraries
from stdit_train.config import ConfigError
from stdit_train.device import find_device


def find_pipeline(checkpoint: str) -> str:
    """The pipeline folder that a checkpoint means: itself, or that inside a run folder; a hub id stays as it is.

    Raises:
        ConfigError: a run folder without a finished pipeline, or nothing there.
    """
    path = Path(checkpoint).expanduser()
    if (path / "model_index.json").is_file():
        return str(path)
    if (path / "pipeline" / "model_index.json").is_file():
        return str(path / "pipeline")
    if (path / "config.json").is_file() and (path / "metrics.jsonl").is_file():
        raise ConfigError(f"{path} is a run that has saved no pipeline yet: let it finish, or stop it once with Ctrl-C")
    if path.is_dir():
        raise ConfigError(f"{path} is neither a pipeline folder (model_index.json) nor a run folder")
    if path.exists():
        raise ConfigError(f"{path} is a file: convert it first with `stdit weights convert {path} FOLDER`")
    if checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1:
        raise ConfigError(f"no checkpoint at {checkpoint}: give a pipeline folder, a run folder or a hub id")
    return checkpoint


def load_pipeline(checkpoint: str) -> STDiTPipeline:
    """Load a pipeline, its progress bar off: in bfloat16 on CUDA, else in float32 on MPS or the CPU.

    Raises:
        ConfigError: it can't be found or, offline, not be fetched.
    """
    source = find_pipeline(checkpoint)
    device = find_device()
    quiet_libraries()
    try:
        pipeline = STDiTPipeline.from_pretrained(source)
    except OSError as error:
        if Path(source).is_dir():
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot load {source!r}: {reason}. Download it where there is a network (hf download {source}) "
            "and give its folder with --checkpoint"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
