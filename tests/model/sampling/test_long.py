"""Continuation and windows, with an exact denoiser of straight lines: motion must go on at constant speed."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stdit_model.model import TextCache
from stdit_model.sampling.continuation import plan_windows
from stdit_model.sampling.denoise import Denoiser
from stdit_model.sampling.schedulers import predicts_velocity

FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 4.0}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=4.0),
    "ddpm": lambda: DDPMScheduler(variance_type="fixed_small", timestep_spacing="linspace", clip_sample=False),
    "ddim": lambda: DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "dpmsolver++ flow": lambda: DPMSolverMultistepScheduler(**FLOW),
    "unipc flow": lambda: UniPCMultistepScheduler(**FLOW),
}


NO_TEXT = TextCache(None)


class Lines:
    """The ideal denoiser of "videos" in which every value moves at a constant speed of its own.

    Each value is a Gaussian process over 16 frames: a level, a slope and a little roughness, so the best estimate of
    the clean video is a matrix product.
    """

    dtype = torch.float32

    def __init__(self, scheduler: Any, frames: int = 16, slope: float = 0.12, rough: float = 0.02) -> None:
        t = torch.arange(frames) - (frames - 1) / 2
        self.covariance = 1.0 + slope**2 * t[:, None] * t[None] + rough**2 * torch.eye(frames)
        self.scheduler = scheduler

    def __call__(self, x: Tensor, timestep: Tensor, **_: Any) -> Tensor:
        flow = predicts_velocity(self.scheduler)
        if flow:
            noise = float(timestep[0]) / 1000
            signal = 1 - noise
        else:
            signal = float(self.scheduler.alphas_cumprod[int(timestep[0])]) ** 0.5
            noise = (1 - signal**2) ** 0.5
        inner = signal**2 * self.covariance + noise**2 * torch.eye(len(self.covariance))
        clean = torch.einsum("ts,bcshw->bcthw", signal * self.covariance @ torch.linalg.inv(inner), x)
        epsilon = (x - signal * clean) / noise
        return epsilon - clean if flow else epsilon


def make(sampler: str, resampling_steps: int, total: int = 64) -> Tensor:
    """Sample a long "video" of 128 lines, in windows of 16 that share 8."""
    scheduler = SCHEDULERS[sampler]()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, total, 4, 4, generator=generator)
    denoise = Denoiser(Lines(scheduler), scheduler, NO_TEXT, 20, generator, resampling_steps=resampling_steps)  # type: ignore[arg-type]
    made = noise[:, :, :0]
    for start, stop, known in plan_windows(total, 0, 16, 8):
        x = denoise(noise[:, :, start:stop], made[:, :, start:] if known else None)
        made = torch.cat([made, x[:, :, known:]], dim=2)
    return made


def drift(made: Tensor) -> float:
    """How much the speed of the last frames differs from that of the first window, over the latter, on average."""
    first, last = ((made[:, :, stop] - made[:, :, start]) / 15 for start, stop in ((0, 15), (48, 63)))
    return ((last - first).abs().mean() / first.abs().mean()).item()


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_motion_goes_on_at_constant_speed(sampler: str) -> None:
    made = make(sampler, resampling_steps=3)
    assert made.shape[2] == 64
    assert drift(made) < (0.4 if sampler.startswith("unipc") else 0.25)  # of 6 seams together; without it is above 1


def test_without_resampling_it_would_not() -> None:
    assert drift(make("euler", resampling_steps=0)) > 1


def test_given_frames_stay(sampler: str = "euler") -> None:
    scheduler = SCHEDULERS[sampler]()
    generator = torch.Generator().manual_seed(0)
    first = torch.linspace(0, 1, 8)[None, None, :, None, None].expand(1, 4, 8, 4, 4)
    denoise = Denoiser(Lines(scheduler), scheduler, NO_TEXT, 20, generator)  # type: ignore[arg-type]
    x = denoise(torch.randn(1, 4, 16, 4, 4, generator=generator), first)
    assert torch.equal(x[:, :, :8], first)
    line = torch.linspace(0, 15 / 7, 16)[None, None, :, None, None].expand_as(x)
    assert (x - line).abs().max() < 0.25  # the slope of the given frames, to the prior's roughness


@given(st.integers(1, 300), st.integers(0, 40), st.integers(2, 32), st.integers(1, 31))
def test_windows_cover_everything_once(total: int, known: int, window: int, overlap: int) -> None:
    if overlap >= window or known >= total:
        with pytest.raises(ValueError, match=r"overlap|nothing is left"):
            plan_windows(total, known, window, overlap)
        return
    made = known
    for start, stop, there in plan_windows(total, known, window, overlap):
        assert stop - start == min(window, total)  # always the length that the model knows
        assert start + there == made  # new frames follow the old ones
        assert there >= min(overlap, made)
        made = stop
    assert made == total
