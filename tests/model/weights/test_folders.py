"""One rule for the weights in a folder, in whatever way it is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file

from stdit_model import STDiT
from stdit_model.convert import describe, find, read
from stdit_model.errors import WeightsError, WeightsFileNotFoundError
from stdit_model.sampling.folder import SIGMA_VAE_ID, VAE_ID, write_pipeline
from stdit_model.weights.folders import find_weights
from stdit_model.weights.layouts import SIGMA_TOKENS

NAMES = [
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_under_any_name(name: str, tiny: Callable[..., STDiT], tmp_path: Path) -> None:
    model = tiny(space_scale=0.5)
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    if name.endswith(".bin"):
        torch.save(load_file(file), tmp_path / name)
        file.unlink()
    else:
        file.rename(tmp_path / name)
    again, _ = read(tmp_path)
    assert again.config.space_scale == 0.5
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())
    assert str(tmp_path / name) in describe(tmp_path)
    assert "space_scale 0.5" in "\n".join(describe(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_diffusers_under_any_name(name: str, tmp_path: Path) -> None:
    pixart(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    if name.endswith(".bin"):
        torch.save(load_file(file), tmp_path / name)
        file.unlink()
    else:
        file.rename(tmp_path / name)
    assert find(tmp_path).config["num_heads"] == 4  # from its config.json


def test_what_is_preferred(tmp_path: Path) -> None:
    for name in reversed([*NAMES[:2], "other.pth", NAMES[3]]):
        (tmp_path / name).touch()
    assert find_weights(tmp_path).name == NAMES[0]
    (tmp_path / NAMES[0]).unlink()
    assert find_weights(tmp_path).name == NAMES[1]
    (tmp_path / "another.safetensors").touch()
    with pytest.raises(WeightsError, match=r"several checkpoints .*: name one of them"):
        find_weights(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsFileNotFoundError, match="is an empty folder"):
        find_weights(tmp_path / "empty")


def pixart(folder: Path, **settings: object) -> None:
    """A PixArtTransformer2DModel, whose tensors PixArt-Sigma shares."""
    sizes: dict[str, object] = {
        "num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 1, "cross_attention_dim": 48,
        "caption_channels": 24, "sample_size": 16, "use_additional_conditions": False,
    }  # fmt: skip
    PixArtTransformer2DModel(**{**sizes, **settings}).save_pretrained(folder)


def test_sigma_of_diffusers(tmp_path: Path) -> None:
    """It is told by the pipeline's class, or as a model for large images without micro-conditions."""
    for name in ("alpha", "sigma"):
        pixart(tmp_path / name / "transformer")
        index = {"_class_name": f"PixArt{name.title()}Pipeline", "transformer": ["diffusers", "Transformer2DModel"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    pixart(tmp_path / "large", sample_size=128)
    alpha, sigma, large = (find(tmp_path / name) for name in ("alpha", "sigma", "large"))
    assert (alpha.sigma, sigma.sigma, large.sigma) == (False, True, True)
    assert "model_max_length" not in alpha.config
    assert sigma.config["model_max_length"] == large.config["model_max_length"] == SIGMA_TOKENS
    assert "PixArt-Sigma, diffusers' PixArtTransformer2DModel" in describe(tmp_path / "sigma")[1]
    assert "PixArt-alpha, diffusers' PixArtTransformer2DModel" in describe(tmp_path / "alpha")[1]


@pytest.mark.parametrize(("tokens", "vae"), [(SIGMA_TOKENS, SIGMA_VAE_ID), (120, VAE_ID)])
def test_the_vae_of_the_original_release(tokens: int, vae: str, golden: Callable, tmp_path: Path) -> None:
    weights = dict(golden("pixart_alpha_512").weights)
    weights["y_embedder.y_embedding"] = torch.zeros(tokens, weights["y_embedder.y_embedding"].shape[1])
    torch.save({"state_dict": weights}, tmp_path / "PixArt.pth")
    write_pipeline(tmp_path / "PixArt.pth", tmp_path / "out", num_heads=4)
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_hub_components"]["vae"] == vae
