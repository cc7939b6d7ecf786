"""Sampling on from frames that are given, with a model that was never trained to: an image or a clip to go on from.

At each step the given frames are put in place of the model's own, at half the step's noise, and the model's estimate of
the clean video is noised again a few times before the sampler moves on. That lets the new frames settle on
what fits the given ones; without it they follow their own noise, and motion breaks at the seam. (The replacement
method is that of arXiv:2204.03458, section 3.1; going over a step several times is RePaint's, arXiv:2201.09865.)

Legend: B videos, C latent channels, T frames, H W height and width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHARE = 0.5  # of a step's noise that the given frames get: less tells the model more of them


class Level(NamedTuple):
    """A step's noise: x = signal * clean + noise * epsilon."""

    signal: float
    noise: float
    flow: bool  # the model predicts epsilon - clean, and signal = 1 - noise; else epsilon, and the squares add up to 1

    @classmethod
    def of(cls, scheduler: Any, step: int) -> "Level":
        """Of a step of a diffusers scheduler whose timesteps are set."""
        if "FlowMatch" in type(scheduler).__name__:
            sigma = float(scheduler.sigmas[step])
            return cls(1.0 - sigma, sigma, True)
        alpha_bar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
        return cls(alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5, False)

    def noised(self, clean: Tensor, epsilon: Tensor, share: float = 1.0) -> Tensor:
        """Clean latents at a share of this noise, with the signal that belongs to it."""
        noise = share * self.noise
        signal = 1.0 - noise if self.flow else (1.0 - noise**2) ** 0.5
        return signal * clean + noise * epsilon

    def clean(self, x: Tensor, prediction: Tensor) -> Tensor:
        """The estimate of the clean latents that a prediction [B, C, T, H, W] makes of noisy ones."""
        if self.flow:
            return x - self.noise * prediction
        return (x - self.noise * prediction) / self.signal


def settle(
    x: Tensor,
    given: Tensor,
    level: Level,
    predict: Callable[[Tensor], Tensor],
    draw: Callable[[], Tensor],
    *,
    rounds: int,
    share: float = SHARE,
) -> Tensor:
    """Noisy latents [B, C, T, H, W] of one step, brought to agree with the given frames.

    Args:
        x: the latents at this step's noise.
        given: clean latents of the first frames, [B, C, K, H, W].
        level: this step's noise.
        predict: the guided model without its variance, [B, C, T, H, W] to the same.
        draw: fresh noise like x.
        rounds: times that the estimate is noised again; 0 for replacement alone.
        share: of the step's noise that the given frames get.
    """
    frames = given.shape[2]

    def with_given(latents: Tensor, epsilon: Tensor) -> Tensor:
        seen = level.noised(given, epsilon[:, :, :frames], share)
        return torch.cat([seen, latents[:, :, frames:]], dim=2)

    x = with_given(x, draw())
    for _ in range(rounds):
        clean = level.clean(x, predict(x))
        epsilon = draw()
        x = with_given(level.noised(clean, epsilon), epsilon)
    return x
