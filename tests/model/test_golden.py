"""Equality with the reference releases: golden files made by running them on random weights."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from stdit_model import STDiT
from stdit_model.diffusion import add_noise, iddpm_loss
from stdit_model.sampling.schedulers import iddpm_scheduler

OPEN_SORA = ["opensora_v1_stdit_16x256", "opensora_v1_stdit_64x512", "opensora_v1_stdit_edges"]


@pytest.fixture
def open_sora(golden, tmp_path):
    """A golden file, and the model that its weights make when they come as Open-Sora's .pth."""

    def load(name):
        file = golden(name)
        torch.save(file.weights, tmp_path / "weights.pth")
        model = STDiT.from_open_sora(tmp_path / "weights.pth", num_heads=file.config["num_heads"])
        assert model.config.space_scale == file.config["space_scale"]  # from the file's own position buffers
        assert model.config.time_scale == file.config["time_scale"]
        return model, file

    return load


@pytest.mark.parametrize("name", OPEN_SORA)
def test_forward(name, open_sora, relative) -> None:
    model, file = open_sora(name)
    x, t, y, mask = file.forward_inputs()
    with torch.no_grad():
        assert relative(model(x, t, y, mask), file.expected["forward.output"]) < 2e-6
        assert relative(model(x, t, y), file.expected["forward.output_no_mask"]) < 2e-6


@pytest.mark.parametrize("name", OPEN_SORA)
def test_training(name, open_sora, relative) -> None:
    model, file = open_sora(name)
    _, t, y, mask = file.forward_inputs()
    x0, noise = file.inputs["train.x0"], file.inputs["train.noise"]
    terms = iddpm_loss(model(add_noise(x0, noise, t), t, y, mask), x0, noise, t)
    for key in ("loss", "mse", "vb"):
        assert relative(terms[key], file.expected[f"train.{key}"]) < 2e-6, key
    terms["loss"].mean().backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    assert relative(norm[None], file.expected["train.grad_norm"]) < 2e-6
    gradient = model.blocks[0].attn_temp.qkv.weight.grad
    assert relative(gradient, file.expected["train.grad.blocks.0.attn_temp.qkv.weight"]) < 2e-6


def sample_like_open_sora(model: STDiT, z: Tensor, noise: Tensor, y: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Ancestral sampling with guidance 7 on 3 of 4 channels, noise[i] for the i-th step from t = 999."""
    scheduler: DDPMScheduler = iddpm_scheduler()
    scheduler.set_timesteps(steps)
    null = model.null_caption(len(z), y.shape[-2])
    text = model.encode_text(torch.cat([y.squeeze(1), null]), torch.cat([mask, mask]))
    for i, t in enumerate(scheduler.timesteps):
        output = model(torch.cat([z, z]), t.expand(2 * len(z)), text)
        conditional, unconditional = output.chunk(2)
        guided = unconditional[:, :3] + 7.0 * (conditional[:, :3] - unconditional[:, :3])
        output = torch.cat([guided, conditional[:, 3:]], dim=1)
        z = step_with_noise(scheduler, output, int(t), z, noise[i])
    return z


def step_with_noise(scheduler: DDPMScheduler, output: Tensor, t: int, z: Tensor, noise: Tensor) -> Tensor:
    """A step of diffusers' scheduler, which draws its noise from `randn_tensor`, with this noise instead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
        return scheduler.step(output, t, z).prev_sample


@pytest.mark.parametrize(
    ("name", "steps"), [("opensora_v1_stdit_16x256", 10), ("opensora_v1_stdit_edges", 7)], ids=["10", "7"]
)
def test_sample(name, steps, open_sora, relative) -> None:
    model, file = open_sora(name)
    _, _, y, mask = file.forward_inputs()
    z, noise = file.inputs["sample.z"], file.inputs[f"sample.iddpm{steps}_noise"]
    with torch.no_grad():
        sample = sample_like_open_sora(model, z, noise, y, mask, steps)
    assert relative(sample, file.expected[f"sample.iddpm{steps}_cfg7"]) < 5e-6


@pytest.mark.parametrize("frames", [1, 4, 16])
@pytest.mark.parametrize("variant", ["seq", "parallel"])
def test_pixart_frame_by_frame(variant, frames, golden, relative, tmp_path) -> None:
    """Fresh from PixArt, the output on T frames is PixArt's on each of them."""
    file = golden("pixart_alpha_512")
    torch.save({"state_dict": file.weights}, tmp_path / "pixart.pth")
    model = STDiT.from_pixart(tmp_path / "pixart.pth", num_heads=file.config["num_heads"], variant=variant)
    x, t, y, mask = file.forward_inputs()
    with torch.no_grad():
        output = model(x[:, :, None].expand(-1, -1, frames, -1, -1), t, y, mask)
    for frame in output.unbind(2):
        assert relative(frame, file.expected["output"]) < 2e-6
