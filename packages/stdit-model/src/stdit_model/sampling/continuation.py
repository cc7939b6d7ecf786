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
from typing import NamedTuple

import torch
from torch import Tensor

from stdit_model.diffusion import RESAMPLING_SHARE, NoiseLevel

RESAMPLING_FROM = 0.5  # above this noise the new frames are noised afresh, below it the given ones are corrected


class ConditioningFrames:
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
        self, x: Tensor, level: NoiseLevel, predict: Callable[[Tensor], Tensor], draw: Callable[[], Tensor]
    ) -> Tensor:
        """Noisy latents [B, C, T, H, W] of one step, with the new frames fitted to the given ones.

        Args:
            x: the latents.
            level: this step's noise.
            predict: the guided model without its variance, [B, C, T, H, W] to the same.
            draw: fresh noise like x.
        """
        if level.noise > RESAMPLING_FROM:
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
            self.correction = anderson_step(tried, float(level.signal))
        return self._seen(x, level)

    def _seen(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """The latents as the model sees them, given frames first."""
        seen = level.noised(self.frames, self.epsilon, RESAMPLING_SHARE) + self.correction
        return torch.cat([seen, x[:, :, self.frames.shape[2] :]], dim=2)


def anderson_step(tried: list[tuple[Tensor, Tensor]], damping: float) -> Tensor:
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


class Window(NamedTuple):
    """Frames `start` to `stop` (not counted), of which the first `known` are there already."""

    start: int
    stop: int
    known: int


def plan_windows(total: int, known: int, window: int, overlap: int) -> list[Window]:
    """Windows that together reach `total` frames, each starting `overlap` frames before what is new in it.

    All have the length of `window`, the one that the model was trained on; the last is moved back rather than cut
    short, so that it overlaps more.

    Args:
        total: frames wanted.
        known: frames that are there at the start, 0 for none.
        window: frames that the model makes at once.
        overlap: frames of the past that a window goes on from.

    Raises:
        ValueError: an overlap that leaves nothing new, or nothing to make.
    """
    if not 0 < overlap < window:
        raise ValueError(f"an overlap of {overlap} frames in windows of {window}: take 1 to {window - 1}")
    if known >= total:
        raise ValueError(f"{known} frames are given and {total} wanted: nothing is left to make")
    if total <= window:
        return [Window(0, total, known)]
    windows = []
    while known < total:
        start = min(max(known - overlap, 0), total - window)
        windows.append(Window(start, start + window, known - start))
        known = start + window
    return windows
