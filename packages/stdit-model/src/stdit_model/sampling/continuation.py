"""Continue a video from conditioning frames, and make long videos window by window.

A model that was never trained to continue a video is made to by resampling, after RePaint (Lugmayr et al. 2022,
arXiv:2201.09865). In each denoising step the known frames replace those of the sample, at a fifth of the step's noise
(replacement method: arXiv:2204.03458, section 3.1). Replacement alone leaves the unknown frames at odds with the known
ones, and motion breaks at the seam. So each step first resamples, `resampling_steps` times:

- While there is more noise than signal, as in RePaint: the unknown frames are predicted, noised afresh to the same
  level, and predicted again.
- Later, by correcting the known frames that the model is shown until its estimate of them is what they are. The
  estimate of the unknown frames is then conditioned on the known ones, exactly so where estimates are linear, as for
  Gaussian data. With the Jacobian J of the estimate, its posterior covariance up to a factor (Tweedie's formula),

      E[unknown | noisy, known] = E[unknown | noisy] + J[unknown, known] J[known, known]^-1 (known - E[known | noisy]).

  The equation is solved without J by Anderson acceleration (Anderson 1965; GMRES on linear problems).

Legend: B videos, C latent channels, T frames, K known frames, H W height and width.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from stdit_model.diffusion import RESAMPLING_SHARE, NoiseLevel
from stdit_model.errors import SettingsError
from stdit_model.protocols import VAE
from stdit_model.video_vae import encode_moments, latent_frames, sample_latents, whole_latent_frames

RESAMPLING_FROM = 0.5  # noise level above which unknown frames are noised afresh; below it the known ones are corrected


class ConditioningFrames:
    """The known frames of a window, as they are shown to the model from step to step.

    Args:
        frames: clean latents [B, C, K, H, W].
        noise: the noise that they are shown under, of the same shape.
    """

    def __init__(self, frames: Tensor, noise: Tensor) -> None:
        self.frames = frames
        self.noise = noise
        self.correction = torch.zeros_like(frames)  # added to what is shown; kept from step to step

    def insert(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Replace the first frames of noisy latents [B, C, T, H, W] by the known ones, noised and corrected."""
        shown = level.noised(self.frames, self.noise, RESAMPLING_SHARE) + self.correction
        return torch.cat([shown, self.unknown(x)], dim=2)

    def known(self, x: Tensor) -> Tensor:
        """Select the known frames of latents: [B, C, T, H, W] -> [B, C, K, H, W]."""
        return x[:, :, : self.frames.shape[2]]

    def unknown(self, x: Tensor) -> Tensor:
        """Select the unknown frames of latents: [B, C, T, H, W] -> [B, C, T - K, H, W]."""
        return x[:, :, self.frames.shape[2] :]


def anderson_step(tried: list[tuple[Tensor, Tensor]], damping: float) -> Tensor:
    """Choose the next point on the way to a zero residual by Anderson acceleration, separately for each video.

    Args:
        tried: (point, residual) so far, each [B, ...], the newest last.
        damping: step length along the residual.

    Source: Anderson 1965; Walker & Ni 2011, equation 2.2.
    """
    point, residual = tried[-1]
    if len(tried) == 1:
        return point + damping * residual
    flat = [(z.flatten(1), r.flatten(1)) for z, r in tried]
    d_point_BNM = torch.stack([after - before for (before, _), (after, _) in pairwise(flat)], dim=2)
    d_residual_BNM = torch.stack([after - before for (_, before), (_, after) in pairwise(flat)], dim=2)
    # Least squares for the mix of past differences that cancels the residual, by normal equations in a few unknowns.
    place = torch.device("cpu") if residual.device.type == "mps" else residual.device  # MPS has no float64
    normal_BMM = (d_residual_BNM.mT @ d_residual_BNM).to(place).double()
    target_BM1 = (d_residual_BNM.mT @ flat[-1][1][:, :, None]).to(place).double()
    mix_BM1 = (torch.linalg.pinv(normal_BMM, rtol=1e-7, hermitian=True) @ target_BM1).to(residual)
    step_back = ((d_point_BNM + damping * d_residual_BNM) @ mix_BM1)[:, :, 0]
    return (flat[-1][0] + damping * flat[-1][1] - step_back).view_as(point)


class Window(NamedTuple):
    """Frames `start` up to `stop` (exclusive), of which the first `known` exist already."""

    start: int
    stop: int
    known: int


def plan_windows(total: int, known: int, window: int, overlap: int) -> list[Window]:
    """Plan windows that together make `total` frames, each beginning with `overlap` frames of the one before.

    All have the length that the model was trained on. The last one starts earlier rather than being shorter, so it
    may overlap more.

    Args:
        total: frames of the video.
        known: frames that exist at the start.
        window: frames of a window.
        overlap: frames that consecutive windows share.

    Raises:
        SettingsError: the overlap is not below the window, or all frames exist already.
    """
    if not 0 < overlap < window:
        raise SettingsError(f"overlap of {overlap} frames in windows of {window}: expected 1 to {window - 1}")
    if known >= total:
        raise SettingsError(f"{known} first frames in a video of {total}: nothing is left to sample")
    if total <= window:
        return [Window(0, total, known)]
    windows = []
    while known < total:
        start = min(max(known - overlap, 0), total - window)
        windows.append(Window(start, start + window, known - start))
        known = start + window
    return windows


def latent_windows(vae: VAE, total: int, known: int, window: int | None, overlap: int | None) -> list[Window]:
    """Plan windows of latent frames.

    Args:
        vae: gives the number of latent frames.
        total, known: latent frames of the video, and those that exist at the start.
        window, overlap: in frames of pixels; None for one window, and for half a window.

    Raises:
        SettingsError: see `plan_windows`.
    """
    length = total if window is None else latent_frames(vae, window)
    if length >= total:
        return [Window(0, total, known)]
    shared = length // 2 if overlap is None else latent_frames(vae, overlap)
    return plan_windows(total, known, length, shared)


def encode_first_frames(vae: VAE, first_frames: Tensor, batch: int, clip: tuple[int, int, int]) -> Tensor:
    """Encode the frames that a video begins with to latents, the posterior's mean: [B, C, K, H, W].

    Args:
        vae: on the device of the frames.
        first_frames: pixels [3, K, H, W] or [B, 3, K, H, W] in [-1, 1].
        batch: B.
        clip: frames, height and width of the video.

    Raises:
        SettingsError: frames of another size, or not fewer than the video has.
    """
    frames = first_frames if first_frames.ndim == 5 else first_frames[None]
    if frames.ndim != 5 or frames.shape[1] != 3 or tuple(frames.shape[-2:]) != clip[1:]:
        expected = f"[3, K, {clip[1]}, {clip[2]}]"
        raise SettingsError(f"expected first_frames of shape {expected}, not {list(first_frames.shape)}")
    if frames.shape[2] >= clip[0]:
        raise SettingsError(f"{frames.shape[2]} first_frames in a video of {clip[0]}: nothing is left to sample")
    latents = sample_latents(vae, encode_moments(vae, frames.expand(batch, -1, -1, -1, -1)))
    return latents[:, :, : whole_latent_frames(vae, frames.shape[2])]
