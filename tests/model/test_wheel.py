"""The package alone, as somebody else installs it: its wheel in a fresh environment, without transformers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USE = """
import importlib.util, sys, tempfile
assert importlib.util.find_spec("transformers") is None and importlib.util.find_spec("accelerate") is None
import torch
from stdit_model import STDiT
import stdit_model
assert sys.prefix in stdit_model.__file__, stdit_model.__file__
model = STDiT.from_preset("S/2")
x, t, y = torch.randn(1, 4, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 120, 4096)
with torch.no_grad():
    assert model(x, t, y).shape == (1, 8, 2, 8, 8)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    before = model(x, t, y)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        after = STDiT.from_pretrained(folder)(x, t, y)
assert before.abs().max() > 0 and torch.equal(before, after)
print("parameters", model.num_parameters())
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv builds the wheel")
def test_wheel_alone(tmp_path) -> None:
    def run(*command: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    run("uv", "build", "--wheel", "--package", "stdit-model", "--out-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    run("uv", "venv", "--python", version, "environment")
    python = tmp_path / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run("uv", "pip", "install", "--python", str(python), str(wheel))
    output = run(str(python), "-c", USE)
    assert "parameters 38369696" in output
    assert "accelerate" not in output  # nothing nags about what is not needed
