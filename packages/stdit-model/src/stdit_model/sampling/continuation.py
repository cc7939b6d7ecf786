"""Sampling on from frames that are given, with a model that was never trained to: an image or a clip to go on from.

The given frames are put in at each step, with less noise than the step's, which tells the model more of them. That
alone (the replacement method of arXiv:2204.03458, section 3.1) leaves the new frames to their own noise, and motion
breaks at the seam. So each step first spends a few evaluations of the model on bringing the two together:

- While there is more noise than signal, the estimate of the new frames is noised afresh and estimated again (as in
  RePaint, arXiv:2201.09865): they move to where they fit.
- Later what the model sees of the given frames is corrected until its own estimate of them is what they are. Its
  estimate of the new frames is then the one that belongs to the given ones: exact where estimates are linear, as for
  Gaussian data, since with the Jacobian J of the estimate, its posterior covariance up to a factor (Tweedie),

      E[new | noisy, given] = E[new | noisy] + J[new, given] J[given, given]^-1 (given - E[given | noisy]).

  The equation is solved without J, with Anderson acceleration (Anderson 1965), which finds the mix of the corrections
  tried so far that leaves the least; on linear problems it is GMRES.

Legend: B videos, C latent channels, T frames, K given frames, H W height and width.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit_model.diffusion import add_noise

SHARE = 0.2  # of a step's noise that the given frames are seen under
NOISY = 0.5  # above this noise the new frames are noised afresh, below it the given ones are corrected


class Level(NamedTuple):
    """A step's noise: x = signal * clean + noise * epsilon. In training each clip has its own, [B, 1, 1, 1, 1]."""

    signal: float | Tensor
    noise: float | Tensor
    flow: bool  # the model predicts epsilon - clean, and signal = 1 - noise; else epsilon, and the squares add up to 1

    @classmethod
    def of(cls, scheduler: Any, step: int) -> "Level":
        """Of a step of a diffusers scheduler whose timesteps are set."""
        if "FlowMatch" in type(scheduler).__name__:
            sigma = float(scheduler.sigmas[step])
            return cls(1.0 - sigma, sigma, True)
        alpha_bar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])
        return cls(alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5, False)

    @classmethod
    def of_flow(cls, sigma: Tensor) -> "Level":
        """Of rectified flow at sigma [B] in 0..1."""
        sigma = sigma.float()[:, None, None, None, None]
        return cls(1.0 - sigma, sigma, True)

    @classmethod
    def of_iddpm(cls, timestep: Tensor) -> "Level":
        """Of timesteps [B] in 0..999."""
        one = torch.ones(len(timestep), 1, 1, 1, 1, device=timestep.device)
        zero = torch.zeros_like(one)
        return cls(add_noise(one, zero, timestep), add_noise(zero, one, timestep), False)

    def noised(self, clean: Tensor, epsilon: Tensor, share: float = 1.0) -> Tensor:
        """Clean latents under a share of this noise, with the signal that belongs to it."""
        noise = share * self.noise
        signal = 1.0 - noise if self.flow else (1.0 - noise**2) ** 0.5
        return signal * clean + noise * epsilon

    def clean(self, x: Tensor, prediction: Tensor) -> Tensor:
        """The estimate of the clean latents that a prediction [B, C, T, H, W] makes of noisy ones."""
        if self.flow:
            return x - self.noise * prediction
        return (x - self.noise * prediction) / self.signal


class Given:
    """The given frames of a video under way, and the correction so far, which goes on from step to step.

    Args:
        frames: clean latents [B, C, K, H, W].
        epsilon: the noise that they are seen under, of the same shape.
        rounds: evaluations of the model that a step spends on fitting the new frames; 0 is the replacement method.
    """

    def __init__(self, frames: Tensor, epsilon: Tensor, rounds: int) -> None:
        self.frames, self.epsilon, self.rounds = frames, epsilon, rounds
        self.correction = torch.zeros_like(frames)

    def settle(
        self, x: Tensor, level: Level, predict: Callable[[Tensor], Tensor], draw: Callable[[], Tensor]
    ) -> Tensor:
        """Noisy latents [B, C, T, H, W] of one step, with the new frames fitted to the given ones.

        Args:
            x: the latents.
            level: this step's noise.
            predict: the guided model without its variance, [B, C, T, H, W] to the same.
            draw: fresh noise like x.
        """
        if level.noise > NOISY:
            for _ in range(self.rounds):
                x = self._seen(x, level)
                epsilon = draw()
                x = level.noised(level.clean(x, predict(x)), epsilon)
                self.epsilon = epsilon[:, :, : self.frames.shape[2]]
            return self._seen(x, level)
        tried: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.rounds):
            latents = self._seen(x, level)
            estimate = level.clean(latents, predict(latents))[:, :, : self.frames.shape[2]]
            tried.append((self.correction, self.frames - estimate))
            self.correction = accelerated(tried, float(level.signal))
        return self._seen(x, level)

    def _seen(self, x: Tensor, level: Level) -> Tensor:
        """The latents as the model sees them, given frames first."""
        seen = level.noised(self.frames, self.epsilon, SHARE) + self.correction
        return torch.cat([seen, x[:, :, self.frames.shape[2] :]], dim=2)


def accelerated(tried: list[tuple[Tensor, Tensor]], damping: float) -> Tensor:
    """The next point to try on the way to where the residual vanishes: Anderson acceleration, each video by itself.

    Args:
        tried: (point, residual) so far, each [B, ...], the newest last.
        damping: how far a plain step goes along the residual.
    """
    point, residual = tried[-1]
    if len(tried) == 1:
        return point + damping * residual
    flat = [(z.flatten(1), r.flatten(1)) for z, r in tried]
    moves_BNM = torch.stack([after - before for (before, _), (after, _) in pairwise(flat)], dim=2)
    turns_BNM = torch.stack([after - before for (_, before), (_, after) in pairwise(flat)], dim=2)
    # Which mix of the past turns undoes the residual: least squares, by the normal equations of a few unknowns.
    normal_BMM = (turns_BNM.mT @ turns_BNM).double()
    wanted_BM1 = (turns_BNM.mT @ flat[-1][1][:, :, None]).double()
    mix_BM1 = (torch.linalg.pinv(normal_BMM, rtol=1e-7, hermitian=True) @ wanted_BM1).to(residual.dtype)
    undone = ((moves_BNM + damping * turns_BNM) @ mix_BM1)[:, :, 0]
    return (flat[-1][0] + damping * flat[-1][1] - undone).view_as(point)
