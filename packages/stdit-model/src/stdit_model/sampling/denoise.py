"""The sampling loop: from noise to latents, one window of frames at a time.

Legend: B videos, C latent channels, T frames, H W height and width.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stdit_model.diffusion import NoiseLevel
from stdit_model.model import STDiT, TextCache
from stdit_model.sampling.continuation import ConditioningFrames

AfterStep = Callable[[int, Tensor, Tensor], Tensor | None]  # (step, timestep, latents) -> latents; None to stop


@dataclass(frozen=True)
class Denoiser:
    """What stays the same from step to step; the arguments are those of `STDiTPipeline.__call__`."""

    transformer: STDiT
    scheduler: Any
    text: TextCache  # of the prompts, and with guidance of the unconditional half after them
    steps: int
    generator: torch.Generator | list[torch.Generator] | None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: int | None = None
    space_scale: float | None = None
    time_scale: float | None = None
    settling: int = 3

    def __call__(self, x: Tensor, past: Tensor | None, after_step: AfterStep) -> Tensor:
        """Denoise latents [B, C, T, H, W].

        Args:
            x: the starting noise.
            past: clean latents of the first frames [B, C, K, H, W], which the others go on from; None for none.
            after_step: told each step's latents; gives back those to go on with, or None to stop there.
        """
        channels = x.shape[1]
        self.scheduler.set_timesteps(self.steps, device=x.device)
        given = None if past is None else ConditioningFrames(past, x[:, :, : past.shape[2]], self.settling)
        for i, t in enumerate(self.scheduler.timesteps):
            if given is not None:
                estimate = partial(self._epsilon, step=i, t=t)
                x = given.settle(x, NoiseLevel.of(self.scheduler, i), estimate, self._noise_like(x))
            output = self.predict(x, i, t)
            if not learns_variance(self.scheduler):
                output = output[:, :channels]
            replaced = after_step(i, t, self._step(output, t, x))
            if replaced is None:
                break
            x = replaced
        return x if past is None else torch.cat([past, x[:, :, past.shape[2] :]], dim=2)

    def unguided(self, batch: int) -> "Denoiser":
        """The same by the prompts alone, for so many videos."""
        return replace(self, guidance_scale=1.0, text=prompts_half(self.text, batch))

    def predict(self, x: Tensor, step: int, t: Tensor) -> Tensor:
        """Epsilon or velocity, guided, and the variance where the model has one: [B, C or 2C, T, H, W] float32.

        The two halves of guidance go through the model in one batch.
        """
        batch, channels = x.shape[:2]
        scale_input = getattr(self.scheduler, "scale_model_input", lambda x, _: x)
        x = scale_input(x, t).to(self.transformer.dtype)
        guided = self.guidance_scale != 1.0 and acts(step, self.steps, self.guidance_interval)
        text = self.text if guided or self.guidance_scale == 1.0 else prompts_half(self.text, batch)
        if guided:
            x = torch.cat([x, x])
        timestep = t.expand(len(x)).to(x.device)
        output = self.transformer(x, timestep, text, space_scale=self.space_scale, time_scale=self.time_scale).float()
        if guided:
            output = guide(output, self.guidance_scale, self.guidance_channels or channels, self.guidance_rescale)
        return output

    def _epsilon(self, x: Tensor, step: int, t: Tensor) -> Tensor:
        """`predict` without the variance."""
        return self.predict(x, step, t)[:, : x.shape[1]]

    def _noise_like(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)

    def _step(self, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """One scheduler step; ancestral samplers draw from the generator."""
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            return self.scheduler.step(output, t, x, generator=self.generator, return_dict=False)[0]
        return self.scheduler.step(output, t, x, return_dict=False)[0]


def learns_variance(scheduler: Any) -> bool:
    """Whether a scheduler wants epsilon and variance; the others keep the setting and take epsilon alone."""
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.get("variance_type") in (
        "learned",
        "learned_range",
    )


def guide(output: Tensor, scale: float, channels: int, rescale: float = 0.0) -> Tensor:
    """Guidance on the first `channels` channels: [2B, C', T, H, W] -> [B, C', T, H, W].

    The first half of the batch is the prompts', the second the unconditional one. All other channels (variance) are
    the prompts'.

    Args:
        output: of the denoiser.
        scale: 1 leaves the prompts' half as it is.
        channels: how many are guided.
        rescale: from 0 to 1, how far each guided video's standard deviation is brought back to that of the prompts'
            half, against over-exposure at large scales (arXiv:2305.08891, section 3.4).
    """
    conditional, unconditional = output.chunk(2)
    guided = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    if rescale:
        axes = tuple(range(1, output.ndim))
        wanted = conditional[:, :channels].std(axes, keepdim=True)
        factor = wanted / guided.std(axes, keepdim=True).clamp_min(1e-12)
        guided = guided * (rescale * factor + 1.0 - rescale)
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def acts(step: int, steps: int, interval: tuple[float, float]) -> bool:
    """Whether guidance acts in this step: the interval is a share of the steps, from 0 (all noise) to 1 (all done)."""
    return interval[0] * steps <= step < interval[1] * steps


def prompts_half(text: TextCache, batch: int) -> TextCache:
    """What the prompts alone were encoded to, of a cache that the unconditional half follows."""
    mask = text.mask_BL
    return TextCache(
        [(keys[:batch], values[:batch]) for keys, values in text.keys_values], None if mask is None else mask[:batch]
    )
