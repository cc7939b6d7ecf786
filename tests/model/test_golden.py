"""Equality with the reference releases: golden files made by running them on random weights."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from stdit_model import STDiT
from stdit_model.diffusion import add_noise, iddpm_loss
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
OPEN_SORA = ["opensora_v1_stdit_16x256", "opensora_v1_stdit_64x512", "opensora_v1_stdit_edges"]


class Golden(NamedTuple):
    model: STDiT
    config: dict
    tensors: dict[str, Tensor]


def load(name: str) -> Golden:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    model = STDiT(
        depth=config["depth"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_heads"],
        patch_size=tuple(config["patch_size"]) if isinstance(config["patch_size"], list) else (1, 2, 2),
        caption_channels=config["caption_channels"],
        model_max_length=config["model_max_length"],
        space_scale=config.get("space_scale", 1.0),
        time_scale=config.get("time_scale", 1.0),
    )
    weights = {
        key.removeprefix("weights."): value
        for key, value in tensors.items()
        if key.startswith("weights.") and "pos_embed" not in key
    }
    if weights["x_embedder.proj.weight"].ndim == 4:
        weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].unsqueeze(2)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("attn_temp" in key for key in missing)
    return Golden(model, config, tensors)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", OPEN_SORA)
def test_forward(name: str) -> None:
    model, _, tensors = load(name)
    x, t, y, mask = (tensors[f"input.{key}"] for key in ("x", "timestep", "y", "mask"))
    with torch.no_grad():
        assert relative(model(x, t, y.squeeze(1), mask), tensors["expected.forward.output"]) < 2e-6
        assert relative(model(x, t, y.squeeze(1)), tensors["expected.forward.output_no_mask"]) < 2e-6


@pytest.mark.parametrize("name", OPEN_SORA)
def test_training(name: str) -> None:
    model, _, tensors = load(name)
    t, y, mask = (tensors[f"input.{key}"] for key in ("timestep", "y", "mask"))
    x0, noise = tensors["input.train.x0"], tensors["input.train.noise"]
    terms = iddpm_loss(model(add_noise(x0, noise, t), t, y.squeeze(1), mask), x0, noise, t)
    for key in ("loss", "mse", "vb"):
        assert relative(terms[key], tensors[f"expected.train.{key}"]) < 2e-6, key
    terms["loss"].mean().backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    assert relative(norm, tensors["expected.train.grad_norm"]) < 2e-6
    gradient = model.blocks[0].attn_temp.qkv.weight.grad
    assert relative(gradient, tensors["expected.train.grad.blocks.0.attn_temp.qkv.weight"]) < 2e-6


@pytest.mark.parametrize("frames", [1, 4, 16])
def test_pixart_frame_by_frame(frames: int) -> None:
    """With its temporal projections zero, STDiT on T frames is PixArt on each of them."""
    model, _, tensors = load("pixart_alpha_512")
    x, t, y, mask = (tensors[f"input.{key}"] for key in ("x", "timestep", "y", "mask"))
    with torch.no_grad():
        output = model(x[:, :, None].expand(-1, -1, frames, -1, -1), t, y.squeeze(1), mask)
    for frame in output.unbind(2):
        assert relative(frame, tensors["expected.output"]) < 2e-6
