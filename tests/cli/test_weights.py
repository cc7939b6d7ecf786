"""`stdit weights`: arguments in, lines out; what it says and writes is tested in tests/model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from stdit_cli.commands.weights import app

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def release(tmp_path):
    """Weights with Open-Sora v1.0's names."""
    with safe_open(GOLDEN / "opensora_v1_stdit_64x512.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118  (not a mapping)
        tensors = {name.removeprefix("weights."): file.get_tensor(name) for name in names}
    torch.save(tensors, tmp_path / "release.pth")
    return tmp_path / "release.pth"


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_inspect(release) -> None:
    code, output = run("inspect", release)
    assert code == 0
    assert "parameters    61,568" in output
    assert "as seq        every tensor fits" in output


def test_the_bundled_model_by_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = run("inspect", "demo")
    assert code == 0
    assert "parameters    854,896" in output
    code, output = run("convert", "demo", tmp_path / "demo.safetensors")
    assert code == 0, output
    code, output = run("convert", "demo", tmp_path / "scaled.safetensors", "--space-scale", 0)
    assert code == 2


def test_convert_and_back(release, tmp_path) -> None:
    code, output = run("convert", release, tmp_path / "pipeline", "--num-heads", 2, "--vae", "me/vae")
    assert (code, output) == (0, f"{tmp_path / 'pipeline'}: STDiT seq, 61,568 parameters\n")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_hub_components"]["vae"] == "me/vae"
    code, _ = run("convert", tmp_path / "pipeline", tmp_path / "back.safetensors")
    assert code == 0
    original, back = torch.load(release, weights_only=True), load_file(tmp_path / "back.safetensors")
    assert original.keys() == back.keys()
    assert all(torch.equal(original[name], back[name]) for name in original)


def test_convert_from_pixart(tmp_path) -> None:
    with safe_open(GOLDEN / "pixart_alpha_512.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118  (not a mapping)
        tensors = {name.removeprefix("weights."): file.get_tensor(name) for name in names}
    torch.save({"state_dict": {}, "state_dict_ema": tensors}, tmp_path / "pixart.pth")
    save_file({"null": torch.ones(5, 24)}, tmp_path / "null.safetensors")
    code, _ = run(
        "convert", tmp_path / "pixart.pth", tmp_path / "out", "--ema", "--num-heads", 4, "--variant", "parallel",
        "--null-caption", tmp_path / "null.safetensors", "--space-scale", 0.5, "--time-scale", 2, "--scheduler", "flow",
    )  # fmt: skip
    assert code == 0
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    expected = {"variant": "parallel", "model_max_length": 5, "space_scale": 0.5, "time_scale": 2.0, "num_heads": 4}
    assert config.items() >= expected.items()
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def test_components_are_not_for_a_file(release, tmp_path) -> None:
    code, output = run("convert", release, tmp_path / "out.pth", "--text-encoder", "me/t5")
    assert code == 2
    assert "--text-encoder" in output
    assert not (tmp_path / "out.pth").exists()
