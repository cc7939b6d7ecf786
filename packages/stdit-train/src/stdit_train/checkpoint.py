"""Training checkpoints: a folder for each, written beside and renamed, so that there is never half of one.

step-000500/model.safetensors  ema.safetensors  optimizer.pt  state.json
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from stdit_train.config import ConfigError

_PARTS = ("model.safetensors", "ema.safetensors", "optimizer.pt", "state.json")


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    ema: nn.Module,
    optimizers: list[Optimizer],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-<step>` and delete all but the newest `keep`. `state` is plain JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial / "model.safetensors")
        save_file({k: v.contiguous() for k, v in ema.state_dict().items()}, partial / "ema.safetensors")
        torch.save([optimizer.state_dict() for optimizer in optimizers], partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        for part in _PARTS:
            _sync(partial / part)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if all((path / part).is_file() for part in _PARTS))


def load_checkpoint(path: Path, model: nn.Module, ema: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Restore everything in place and return the state.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    for name, module in (("model", model), ("ema", ema)):
        try:
            module.load_state_dict(load_file(path / f"{name}.safetensors"))
        except RuntimeError as error:
            detail = str(error).strip().splitlines()[-1].strip()
            raise ConfigError(f"{path} does not fit this model: {detail}") from error
    saved = torch.load(path / "optimizer.pt", weights_only=True)
    if len(saved) != len(optimizers):
        raise ConfigError(f"{path} was trained with another optimizer: resume with the run's own settings")
    for optimizer, state in zip(optimizers, saved, strict=True):
        optimizer.load_state_dict(state)
    return json.loads((path / "state.json").read_text())


def _sync(path: Path) -> None:
    """On disk before the rename, so that a power cut leaves the old checkpoint or the new one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
