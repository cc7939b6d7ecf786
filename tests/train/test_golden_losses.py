"""A recorded loss curve: 20 steps of two objectives, so that a change proves that it trains the same.

The values come from one thread of an x86-64 CPU in float32. There they are compared to the bit; elsewhere (other
processors, other builds of torch) float32 sums round differently, and the curve may drift by a part in a thousand.
After a change that is meant to change training, write the file anew and say why in the commit:

    STDIT_RECORD=1 uv run pytest tests/train/test_golden_losses.py
"""

import json
import os
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit_train.build import build_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import from_dict, set_values, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.tracking.metrics import read_metrics

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "flow": {"objective.name": "flow", "optimizer.name": "muon"},
    "iddpm": {"objective.name": "iddpm", "optimizer.name": "adamw", "optimizer.lr": 1e-3, "model.variant": "parallel"},
}


def machine() -> dict[str, str]:
    """What the last bits of a float32 sum depend on: the build of torch and the processor it picks its kernels for."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    cpu = models[0] if models else platform.processor()
    return {"torch": torch.__version__, "cpu": cpu, "instructions": torch.backends.cpu.get_cpu_capability()}


def losses(config: TrainConfig, folder: Path) -> list[float]:
    run = RunFolder(folder)
    run.create(config)
    build_trainer(config, run, NullCallback()).train()
    return [row["loss"] for row in read_metrics(run.metrics_file) if "loss" in row]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_follows_the_recorded_losses(objective: str, small: TrainConfig, tmp_path: Path) -> None:
    config = replace(small, steps=20, precision="fp32", checkpoint_every=20)
    config = from_dict(set_values(to_dict(config), OBJECTIVES[objective]))
    found = losses(config, tmp_path / "run")
    assert len(found) == 20
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("STDIT_RECORD"):
        GOLDEN.write_text(json.dumps(golden | machine() | {objective: found}, indent=1) + "\n")
        return
    if {key: golden[key] for key in machine()} == machine():
        assert found == golden[objective]
    else:
        assert found == pytest.approx(golden[objective], rel=1e-3)
