"""The sampling loop: noise to latents, for one window of frames, with classifier-free guidance.

Legend: B videos, C latent channels, T frames, K known frames, H W height and width.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stdit_model.errors import SettingsError
from stdit_model.layers import TextCache
from stdit_model.model import STDiT
from stdit_model.protocols import Scheduler
from stdit_model.sampling.continuation import RESAMPLING_FROM, ConditioningFrames, anderson_step
from stdit_model.sampling.schedulers import check_continuation, model_timestep, noise_level, set_timesteps

OnStepEnd = Callable[[Tensor, Tensor], tuple[Tensor, bool]]  # (timestep, latents) -> latents to continue with, stop


@dataclass
class Guidance:
    """Classifier-free guidance (arXiv:2207.12598), with the terms of diffusers' `ClassifierFreeGuidance`.

    A callback may change it between steps.

    Attributes:
        guidance_scale: weight of the difference between the conditional and the unconditional prediction; 1 is off.
        guidance_rescale: 0 to 1, see `guide`.
        start, stop: share of the steps after which guidance starts and stops (arXiv:2404.07724).
        channels: guide only the first so many latent channels; None for all.
    """

    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    channels: int | None = None

    def enabled(self, step: int, steps: int) -> bool:
        """Whether step `step` of `steps` is guided."""
        return self.guidance_scale != 1.0 and self.start * steps <= step < self.stop * steps


@dataclass(frozen=True)
class Denoiser:
    """The sampling loop, with all that stays the same from window to window.

    Attributes:
        transformer: predicts epsilon or the velocity.
        scheduler: takes the sampling steps.
        text: of the prompts [B]; with guidance [2B], the unconditional half first, as in diffusers.
        num_inference_steps: denoising steps.
        generator: one, or one for each video.
        guidance: off by default.
        space_scale, time_scale: position scales; the model's by default.
        resampling_steps: evaluations of the model that each step spends on resampling, if there are known frames.
        on_timestep: called with the model's timestep before it is evaluated.

    Raises:
        SettingsError: steps without guidance, and FasterCache.
    """

    transformer: STDiT
    scheduler: Scheduler
    text: TextCache
    num_inference_steps: int
    generator: torch.Generator | list[torch.Generator] | None
    guidance: Guidance = field(default_factory=Guidance)
    space_scale: float | None = None
    time_scale: float | None = None
    resampling_steps: int = 3
    on_timestep: Callable[[float], None] | None = None

    def __post_init__(self) -> None:
        self.check_cache(
            all(self.guidance.enabled(i, self.num_inference_steps) for i in range(self.num_inference_steps))
        )

    def __call__(self, x: Tensor, first_frames: Tensor | None = None, on_step_end: OnStepEnd | None = None) -> Tensor:
        """Denoise latents.

        Args:
            x: the starting noise [B, C, T, H, W].
            first_frames: clean latents [B, C, K, H, W] of the known frames that the video continues.
            on_step_end: called with the timestep and the latents after each step; returns the latents to continue with,
                and whether to stop.

        Returns:
            Clean latents [B, C, T, H, W], the first frames unchanged.

        Raises:
            SettingsError: first frames, and a scheduler whose noise levels are not known; or a callback that turns
                guidance off, and FasterCache.
        """
        # 1. Choose the timesteps; known frames keep the starting noise of their place.
        set_timesteps(self.scheduler, self.num_inference_steps)
        conditioning = None
        if first_frames is not None:
            check_continuation(self.scheduler)
            conditioning = ConditioningFrames(first_frames, x[:, :, : first_frames.shape[2]])

        guided = None
        for step, t in enumerate(self.scheduler.timesteps):
            if self.guidance.enabled(step, self.num_inference_steps) != guided:
                guided = self.guidance.enabled(step, self.num_inference_steps)
                self.check_cache(guided)
                self._empty_cache()
            # 2. Insert the known frames, and resample the unknown ones to fit them.
            if conditioning is not None:
                x = self.resample(x, conditioning, step, t)
            # 3. Predict epsilon or the velocity, with guidance.
            output = self.predict(x, step, t)
            if not learns_variance(self.scheduler):
                output = output[:, : x.shape[1]]
            # 4. Take one step towards the data.
            x = self._scheduler_step(output, t, x)
            # 5. Let the caller see the latents, replace them, or stop.
            if on_step_end is not None:
                x, stop = on_step_end(t, x)
                if stop:
                    break

        return x if conditioning is None else torch.cat([conditioning.frames, conditioning.unknown(x)], dim=2)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's inputs; diffusers goes through all weights to find it."""
        return self.transformer.dtype

    def unguided(self, batch: int) -> "Denoiser":
        """Return a denoiser of the same `batch` videos without guidance."""
        return replace(self, guidance=Guidance(), text=self.text.last(batch))

    def resample(self, x: Tensor, conditioning: ConditioningFrames, step: int, t: Tensor) -> Tensor:
        """Insert the known frames and resample the unknown ones to fit them; see `stdit_model.sampling.continuation`.

        Args:
            x: noisy latents [B, C, T, H, W].
            conditioning: the known frames; their noise or their correction changes.
            step: index of the step.
            t: its timestep.
        """
        level = noise_level(self.scheduler, step)
        tried: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.resampling_steps):
            x = conditioning.insert(x, level)
            clean = level.clean(x, self.predict(x, step, t)[:, : x.shape[1]])
            if level.noise > RESAMPLING_FROM:  # RePaint: noise the estimate afresh
                noise = randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
                x = level.noised(clean, noise)
                conditioning.noise = conditioning.known(noise)
            else:  # correct the known frames until the estimate of them is what they are
                tried.append((conditioning.correction, conditioning.frames - conditioning.known(clean)))
                conditioning.correction = anderson_step(tried, float(level.signal))
        return conditioning.insert(x, level)

    def predict(self, x: Tensor, step: int, t: Tensor) -> Tensor:
        """Predict epsilon or the velocity, guided, and the variance if the model does: [B, C or 2C, T, H, W] float32.

        Both halves of guidance are one batch of the model.
        """
        batch, channels = x.shape[:2]
        guided = self.guidance.enabled(step, self.num_inference_steps)
        scale_input = getattr(self.scheduler, "scale_model_input", lambda x, _: x)
        x = scale_input(x, t).to(self.dtype)
        x = torch.cat([x, x]) if guided else x
        text = self.text if guided else self.text.last(batch)
        level = model_timestep(self.scheduler, step)
        if self.on_timestep is not None:
            self.on_timestep(level)
        # filled, not copied: a copy from the host would wait for the device
        timestep = torch.full((len(x),), level, device=x.device, dtype=torch.float32)
        cached = getattr(self.transformer, "is_cache_enabled", False)
        with self.transformer.cache_context("denoising") if cached else nullcontext():
            output = self.transformer(x, timestep, y=text, space_scale=self.space_scale, time_scale=self.time_scale)
        output = output.float()
        if not guided:
            return output
        guidance = self.guidance
        return guide(output, guidance.guidance_scale, guidance.channels or channels, guidance.guidance_rescale)

    def check_cache(self, guided: bool) -> None:
        """Check that the model's cache works with steps that are `guided`, or are not.

        Raises:
            SettingsError: FasterCache, and steps without guidance.
        """
        if not guided and type(getattr(self.transformer, "_cache_config", None)).__name__ == "FasterCacheConfig":
            raise SettingsError("FasterCache skips the unconditional half: it needs guidance in every step and window")

    def _empty_cache(self) -> None:
        """Forget what one of diffusers' caches keeps: of another window, or of a batch of another size."""
        if getattr(self.transformer, "is_cache_enabled", False):
            self.transformer._reset_stateful_cache()

    def _scheduler_step(self, output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Take one scheduler step; ancestral samplers draw from the generator."""
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            return self.scheduler.step(output, t, x, generator=self.generator, return_dict=False)[0]
        return self.scheduler.step(output, t, x, return_dict=False)[0]


def learns_variance(scheduler: Scheduler) -> bool:
    """Whether a scheduler's step takes epsilon and the variance; others take epsilon alone, whatever their settings."""
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.get("variance_type") in (
        "learned",
        "learned_range",
    )


def guide(output: Tensor, scale: float, channels: int, rescale: float = 0.0) -> Tensor:
    """Combine conditional and unconditional predictions: [2B, C', T, H, W] -> [B, C', T, H, W].

    Args:
        output: of the model, the unconditional half first.
        scale: guidance scale; 1 returns the conditional half.
        channels: number of channels that are guided; all others, such as the variance, are the conditional ones.
        rescale: 0 to 1, how far the standard deviation of each video is brought back to that of the conditional half,
            against over-exposure at large scales (arXiv:2305.08891, section 3.4).
    """
    unconditional, conditional = output.chunk(2)
    guided = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    if rescale:
        axes = tuple(range(1, output.ndim))
        target = conditional[:, :channels].std(axes, keepdim=True)
        factor = target / guided.std(axes, keepdim=True).clamp_min(1e-12)
        guided = guided * (rescale * factor + 1.0 - rescale)
    return torch.cat([guided, conditional[:, channels:]], dim=1)
