"""Starting a run from other weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stdit_train.build import build_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.init_weights import load_initial
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import ConfigError, from_dict, set_values, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.parallelize import build_model
from stdit_train.pipeline.find import find_checkpoint

GOLDEN = Path(__file__).parents[2] / "golden" / "pixart_alpha_512.safetensors"


def test_from_another_run(small: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path / "first")
    run.create(small)
    first = build_trainer(small, run, NullCallback())
    first.train()
    again = replace(small, init=str(tmp_path / "first"), seed=1)
    next_run = RunFolder(tmp_path / "second")
    next_run.create(again)
    caplog.set_level("INFO", "stdit_train")
    second = build_trainer(again, next_run, NullCallback())
    assert any("starting from" in line for line in caplog.messages)
    for name, value in first.ema.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


@pytest.mark.parametrize("variant", ["seq", "parallel", "dit", "latte"])
def test_every_variant_from_pixart(small, tmp_path: Path, variant: str) -> None:
    with safe_open(GOLDEN, "pt") as file:
        sizes = json.loads(file.metadata()["config"])
        weights = {k.removeprefix("weights."): file.get_tensor(k) for k in file.keys() if k.startswith("weights.")}  # noqa: SIM118
    torch.save({"state_dict": weights}, tmp_path / "pixart.pth")
    overrides = {
        "objective.name": "iddpm",
        "model.variant": variant,
        "model.hidden_size": sizes["hidden_size"],
        "model.depth": sizes["depth"],
        "model.num_heads": sizes["num_heads"],
        "model.model_max_length": sizes["model_max_length"],
    }
    config = from_dict(set_values(to_dict(small), overrides))
    model = build_model(config, 4, sizes["caption_channels"])
    assert "image model" in load_initial(model, str(tmp_path / "pixart.pth"))
    state = model.state_dict()
    for name, value in weights.items():
        if name in state and name != "x_embedder.proj.weight":
            assert torch.equal(state[name], value), name
    assert torch.equal(state["x_embedder.proj.weight"].squeeze(2), weights["x_embedder.proj.weight"])


def test_another_size_is_named(small, tmp_path: Path) -> None:
    model = build_model(small, 4, 32)
    model.save_pretrained(tmp_path / "saved")
    other = build_model(from_dict(set_values(to_dict(small), {"model.depth": 1})), 4, 32)
    with pytest.raises(ConfigError, match="has depth 2, this run 1"):
        load_initial(other, str(tmp_path / "saved"))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "model.safetensors", "pytorch_model.bin"])
def test_a_model_folder_under_other_names(small: TrainConfig, name: str, tmp_path: Path) -> None:
    """`--init` and `--checkpoint` find what `stdit weights inspect` does."""
    model = build_model(small, 4, 32)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "diffusion_pytorch_model.safetensors"
    if name.endswith(".bin"):
        torch.save(load_file(file), tmp_path / "saved" / name)
        file.unlink()
    else:
        file.rename(tmp_path / "saved" / name)
    other = build_model(replace(small, seed=1), 4, 32)
    load_initial(other, str(tmp_path / "saved"))
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in other.state_dict().items())
    found = find_checkpoint(str(tmp_path / "saved"))
    assert found.bare
    assert [path.name for path in found.weights()] == [name]
    (tmp_path / "released").mkdir()
    torch.save(model.state_dict(), tmp_path / "released" / "OpenSora.pth")
    assert find_checkpoint(str(tmp_path / "released")).weights() == [tmp_path / "released" / "OpenSora.pth"]
