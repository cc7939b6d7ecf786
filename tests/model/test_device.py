"""On a GPU, which is fake: all on the device, no waiting for it in a step, and few kernels."""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from stdit_model import VARIANTS, STDiT, STDiTPipeline, layers
from stdit_model.blocks import Block
from stdit_model.diffusion import add_noise, flow_interpolate, flow_loss, iddpm_loss
from stdit_model.embed import spatial_positions, temporal_positions
from stdit_model.layers import BlockText
from stdit_model.sampling.schedulers import (
    EPSILON_SAMPLERS,
    FLOW_SAMPLERS,
    flow_scheduler,
    iddpm_scheduler,
    use_sampler,
)

COPY = "copy to the device"
# What makes the host wait in a call of the pipeline: the shift and scale of the VAE's latents.
WAITS_OF_A_CALL = Counter({COPY: 2})
# Copies to the device in a step of a scheduler of diffusers: coefficients of UniPC's predictor and corrector.
COPIES_OF_A_STEP = {"unipc": 5}
# Kernels of a block, in eager mode and bfloat16, by how it mixes tokens; attention counts as one.
KERNELS = {"sequential": 27, "parallel": 27, "full": 21, "spatial": 21, "temporal": 22}
SIZES: dict[str, Any] = {"depth": 2, "hidden_size": 144, "num_heads": 2, "caption_channels": 24, "model_max_length": 12}


def load_fake_cuda() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_cuda", Path(__file__).parents[1] / "fake_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FakeCuda = load_fake_cuda().FakeCuda


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def make(variant: str = "seq", dtype: torch.dtype = torch.float32, **settings: Any) -> STDiT:
    with torch.device("cuda"), default_dtype(dtype):
        return STDiT(variant, **SIZES, **settings)


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    like: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    return (
        torch.randn(2, 4, 3, 8, 8, **like),
        torch.zeros(2, device="cuda", dtype=torch.int64),
        torch.randn(2, 12, 24, **like),
        torch.ones(2, 12, device="cuda", dtype=torch.int64),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_stays_on_the_device(variant: str, dtype: torch.dtype) -> None:
    with FakeCuda() as device:
        model = make(variant, dtype)
        x, t, y, mask = make_inputs(dtype)
        output = model(x, t, y, mask)
        assert output.device.type == "cuda"
        assert output.dtype == dtype
        assert not device.waits


def test_losses_stay_on_the_device() -> None:
    with FakeCuda() as device:
        x0, t, _, _ = make_inputs()
        noise, output = torch.randn_like(x0), torch.randn(2, 8, 3, 8, 8, device="cuda")
        mask = torch.ones(2, 3, device="cuda", dtype=torch.bool)
        noisy = add_noise(x0, noise, t), flow_interpolate(x0, noise, torch.rand(2, device="cuda"))
        losses = iddpm_loss(output, x0, noise, t, mask)["loss"], flow_loss(output, x0, noise, mask)["loss"]
        assert {tensor.device.type for tensor in (*noisy, *losses)} == {"cuda"}
        assert not device.waits


def make_pipeline(flow: bool) -> STDiTPipeline:
    with torch.device("cuda"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
        )
    scheduler = flow_scheduler() if flow else iddpm_scheduler()
    pipeline = STDiTPipeline(make(learn_sigma=not flow).eval(), vae.eval(), None, None, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("sampler", "flow"), [(name, True) for name in FLOW_SAMPLERS] + [(name, False) for name in EPSILON_SAMPLERS]
)
def test_a_pipeline_waits_only_where_it_is_listed(sampler: str, flow: bool) -> None:
    steps = 6
    with FakeCuda() as device:
        pipeline = make_pipeline(flow)
        use_sampler(pipeline, sampler)
        y, mask = torch.randn(1, 12, 24, device="cuda"), torch.ones(1, 12, device="cuda", dtype=torch.int64)
        device.waits.clear()
        video = pipeline(
            prompt_embeds=y, prompt_attention_mask=mask, num_frames=3, height=16, width=16, num_inference_steps=steps
        ).frames
        assert video.device.type == "cuda"
    assert device.waits <= WAITS_OF_A_CALL + Counter({COPY: steps * COPIES_OF_A_STEP.get(sampler, 0)})


@pytest.mark.parametrize("mixing", KERNELS)
def test_a_block_launches_few_kernels(mixing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: Tensor, _k: Tensor, _v: Tensor, _mask: Tensor | None = None) -> Tensor:
        """As a fused kernel returns it; without a device torch would choose the products."""
        device.kernels["attention"] += 1
        return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)

    monkeypatch.setattr(layers, "attention", attention)
    with FakeCuda() as device, torch.no_grad():
        with torch.device("cuda"), default_dtype(torch.bfloat16):
            block = Block(144, 2, 4.0, mixing)
            x, text = torch.randn(2, 3, 16, 144), BlockText(torch.randn(2, 12, 144))
            position = torch.randn(3, 144) if mixing in ("sequential", "parallel") else None
        t0, mask = torch.randn(2, 6, 144, device="cuda"), torch.ones(2, 12, device="cuda", dtype=torch.bool)
        block(x, t0, text, mask, position)  # the first call computes the caption's keys and values, too
        device.kernels.clear()
        block(x, t0, text, mask, position)
    assert sum(device.kernels.values()) <= KERNELS[mixing], device.kernels


def test_positions_are_made_once() -> None:
    first = spatial_positions(48, 5, 7, 0.5), temporal_positions(48, 9, 0.75)
    second = spatial_positions(48, 5, 7, 0.5), temporal_positions(48, 9, 0.75)
    assert all(one is other for one, other in zip(first, second, strict=True))
    half = spatial_positions(48, 5, 7, 0.5, dtype=torch.bfloat16)
    assert torch.equal(half, first[0].bfloat16())
    with FakeCuda():  # what has no contents is not kept
        assert spatial_positions(48, 5, 7, 0.5, device=torch.device("cuda")).shape == (35, 48)
        spatial_positions(48, 6, 7, 0.5)
    assert spatial_positions(48, 6, 7, 0.5).abs().max() == 1
