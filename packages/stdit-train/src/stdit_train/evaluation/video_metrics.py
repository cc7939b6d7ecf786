"""What can be measured on videos alone: steadiness over time, and how well a VAE gives clips back.

C channels, T frames, H W pixels; videos [C, T, H, W] in [-1, 1].
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_model import video_vae
from stdit_train.evaluation.confidence import Interval, mean_interval

RANGE = 2.0  # from the least to the greatest value of a pixel
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels
MOST = 100.0  # dB that an exact reconstruction counts as


class Measure(Protocol):
    """Takes videos as they are generated, then says what they came to."""

    def add(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> None:
        """Videos [C, T, H, W] in [-1, 1] and what each was to show."""

    def result(self) -> dict[str, Interval]:
        """By name."""


class Smoothness:
    """Temporal smoothness: `change` from frame to frame and `flicker`, each video counting once."""

    def __init__(self) -> None:
        self._changes: list[float] = []
        self._flickers: list[float] = []

    def add(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> None:
        """Videos of three frames or more; shorter ones have no flicker to measure and are left out."""
        for video in videos:
            if video.shape[1] >= 3:
                self._changes.append(change(video))
                self._flickers.append(flicker(video))

    def result(self) -> dict[str, Interval]:
        """Means over the videos; nothing where none was long enough."""
        if not self._changes:
            return {}
        return {"change": mean_interval(self._changes), "flicker": mean_interval(self._flickers)}


def change(video: Tensor) -> float:
    """Root mean square of the difference between neighbouring frames, as a share of the pixels' range (0..1)."""
    return (video.float().diff(dim=1).square().mean().sqrt() / RANGE).item()


def flicker(video: Tensor) -> float:
    """Root mean square of the second difference over time, over that of the first.

    0 for what doesn't change or fades evenly, √3 for frames of independent noise, 2 for frames that go back and forth.
    """
    first = video.float().diff(dim=1)
    size = first.square().mean().sqrt().item()
    return first.diff(dim=1).square().mean().sqrt().item() / size if size > 1e-6 else 0.0


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, over all pixels of a clip; 100 where they are equal."""
    error = F.mse_loss(video.float(), reference.float()).item()
    return min(MOST, 10 * math.log10(RANGE**2 / error)) if error > 0 else MOST


def ssim(video: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13), mean over all channels, frames and whole windows.

    Raises:
        ValueError: frames smaller than the window of 11 pixels.
    """
    if min(video.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM's window is {WINDOW} pixels wide: frames of {tuple(video.shape[-2:])} are too small")
    x, y = (clip.float().flatten(0, 1)[:, None] for clip in (video, reference))  # [C*T, 1, H, W]
    position = torch.arange(WINDOW, device=x.device) - WINDOW // 2
    line = torch.exp(-(position**2) / (2 * SIGMA**2))
    kernel = (line[:, None] * line[None] / line.sum() ** 2)[None, None]
    mean_x, mean_y, xx, yy, xy = (F.conv2d(image, kernel) for image in (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (light * structure).mean().item()


def reconstruction(vae: Any, clips: Iterable[Tensor]) -> dict[str, Interval]:
    """PSNR and SSIM of clips [3, T, H, W] that a VAE encoded (the mean) and decoded again."""
    ratios, similarities = [], []
    device = next(vae.parameters()).device
    for clip in clips:
        latents = video_vae.sample_latents(vae, video_vae.encode_moments(vae, clip[None].to(device)))
        again = video_vae.decode(vae, latents)[0].cpu()
        ratios.append(psnr(again, clip))
        similarities.append(ssim(again, clip))
    return {"VAE PSNR (dB)": mean_interval(ratios), "VAE SSIM": mean_interval(similarities)}
