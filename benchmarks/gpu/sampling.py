"""Sampling with guidance, from prompt embeddings to decoded frames."""

import time
from functools import partial
from typing import Any

import torch
from benchmarks.gpu.setup import Case, Setup, Values
from diffusers import AutoencoderKL

from stdit_model import STDiTPipeline, flops
from stdit_model.sampling.schedulers import iddpm_scheduler, use_sampler

TITLE = "Sampling one video with XL/2 and guidance 7 in bf16, decoding included"
SAMPLERS = {"dpmsolver++": 20, "ddpm": 100}  # with their steps
VAE = {  # of sd-vae-ft
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TINY_VAE = {**VAE, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}


def cases(setup: Setup) -> list[Case]:
    found = []
    for sampler, usual in SAMPLERS.items():
        steps, rank = 2 if setup.tiny else usual, 1 + (usual > 20)
        for size in setup.latents:
            name = f"{size}, {steps} steps of {sampler}"
            found.append(Case(name, partial(measure, setup, size, sampler, steps), rank))
    steps = 2 if setup.tiny else 20
    for size in setup.latents:
        run = partial(measure, setup, size, "dpmsolver++", steps, compiled=True)
        found.append(Case(f"{size}, {steps} steps of dpmsolver++, blocks compiled", run, rank=2, compiled=True))
    return found


def make_vae(setup: Setup, dtype: torch.dtype) -> AutoencoderKL:
    """Make a VAE of the published size, with random weights."""
    with setup.device:
        vae = AutoencoderKL(**(TINY_VAE if setup.tiny else VAE)).eval()
    return torch.nn.Module.to(vae, dtype)  # that of diffusers warns of parts to keep in float32, of which it has none


def measure(setup: Setup, size: str, sampler: str, steps: int, compiled: bool = False) -> Values:
    model = setup.model().bfloat16().eval()
    if compiled:
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True)
    pipeline = STDiTPipeline(model, make_vae(setup, torch.bfloat16), None, None, iddpm_scheduler())
    use_sampler(pipeline, sampler)
    pipeline.set_progress_bar_config(disable=True)
    frames, height, width = setup.latents[size]
    *_, y, mask = setup.inputs(setup.shape(size, 1))
    denoised = started = 0.0

    def after_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal denoised
        if step == pipeline.num_timesteps - 1:
            setup.wait()
            denoised = time.perf_counter()
        return tensors

    def sample(number: int) -> None:
        nonlocal started
        setup.wait()
        started = time.perf_counter()
        pipeline(
            prompt_embeds=y.bfloat16(), prompt_attention_mask=mask, num_frames=frames, height=8 * height,
            width=8 * width, num_inference_steps=number, guidance_scale=7.0, callback_on_step_end=after_step,
        )  # fmt: skip
        setup.wait()

    sample(1)  # to warm up
    setup.forget_peak()
    sample(steps)
    ended = time.perf_counter()
    work = steps * flops.forward_flops(setup.arguments(), setup.shape(size, 2), y.shape[1])
    return {
        "seconds": ended - started,
        "denoising, s": denoised - started,
        "decoding, s": ended - denoised,
        "s/step": (denoised - started) / steps,
        **setup.utilisation(work, denoised - started),
        "peak GiB": setup.peak_gib(),
    }
