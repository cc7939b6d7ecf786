"""On a GPU, which is fake: all on the device, no waiting for it in a step, and few kernels."""

import importlib.util
import re
import shutil
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
from torch._inductor.utils import run_and_get_code

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
# With the caption's keys and values, and all gradients.
KERNELS_WITH_BACKWARD = {"sequential": 101, "parallel": 95, "full": 79, "spatial": 79, "temporal": 81}
# "sequential" compiled for a CPU, where alike is fused: fused kernels, products, attention; without and with backward.
COMPILED = {False: (7, 9, 3), True: (18, 27, 6)}
SIZES: dict[str, Any] = {"depth": 2, "hidden_size": 144, "num_heads": 2, "caption_channels": 24, "model_max_length": 12}


def load_fake_cuda() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_cuda", Path(__file__).parents[1] / "fake_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake_cuda = load_fake_cuda()
FakeCuda = fake_cuda.FakeCuda


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


class Attention(torch.autograd.Function):
    """As a fused kernel returns results and gradients; without a device torch would choose the products."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernels: Counter[str]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.kernels = kernels
        kernels["attention"] += 1
        return by_tokens(q)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        ctx.kernels["attention's backward"] += 1
        return *map(by_tokens, ctx.saved_tensors), None


def by_tokens(x: Tensor) -> Tensor:
    """A tensor [B, N, L, K] that is stored as [B, L, N, K]."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def block_inputs(mixing: Any, device: str, grad: bool) -> tuple[Block, tuple[Any, ...]]:
    """A block in bfloat16 and its arguments."""
    with torch.device(device), default_dtype(torch.bfloat16):
        block = Block(144, 2, 4.0, mixing)
        x, text = torch.randn(2, 3, 16, 144, requires_grad=grad), torch.randn(2, 12, 144, requires_grad=grad)
        position = torch.randn(3, 144) if mixing in ("sequential", "parallel") else None
    t0 = torch.randn(2, 6, 144, device=device, requires_grad=grad)
    return block, (x, t0, text, torch.ones(2, 12, device=device, dtype=torch.bool), position)


@pytest.mark.parametrize("mixing", KERNELS)
def test_a_block_launches_few_kernels(mixing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "attention", lambda q, k, v, _: Attention.apply(q, k, v, device.kernels))
    with FakeCuda() as device, torch.no_grad():
        block, (x, t0, text, mask, position) = block_inputs(mixing, "cuda", False)
        cached = BlockText(text)
        block(x, t0, cached, mask, position)  # the first call computes the caption's keys and values, too
        device.kernels.clear()
        block(x, t0, cached, mask, position)
    assert sum(device.kernels.values()) <= KERNELS[mixing], device.kernels


@pytest.mark.parametrize("mixing", KERNELS_WITH_BACKWARD)
def test_a_block_launches_few_kernels_with_its_backward(mixing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = fake_cuda.Kernels()
    monkeypatch.setattr(layers, "attention", lambda q, k, v, _: Attention.apply(q, k, v, counter.kernels))
    block, (x, *rest) = block_inputs(mixing, "meta", True)
    with counter:
        block(x, *rest).backward(x.detach())
    assert sum(counter.kernels.values()) <= KERNELS_WITH_BACKWARD[mixing], counter.kernels


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")
@pytest.mark.parametrize("grad", COMPILED, ids=["forward", "with backward"])
def test_a_compiled_block_calls_few_kernels(grad: bool) -> None:
    torch._dynamo.reset()
    block, arguments = block_inputs("sequential", "cpu", grad)
    compiled = torch.compile(block, fullgraph=True)

    def run() -> None:
        with torch.set_grad_enabled(grad):
            output = compiled(*arguments)
            if grad:
                output.sum().backward()

    _, sources = run_and_get_code(run)
    calls = r"^ +(?:\w+ = )?(cpp_fused|extern_kernels|torch\.ops\.aten\._scaled_dot_product)[\w.]*\("
    kinds = Counter(kind for code in sources for kind in re.findall(calls, code.split("def call(", 1)[1], re.M))
    found = tuple(kinds[kind] for kind in ("cpp_fused", "extern_kernels", "torch.ops.aten._scaled_dot_product"))
    assert all(0 < count <= most for count, most in zip(found, COMPILED[grad], strict=True)), kinds


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
