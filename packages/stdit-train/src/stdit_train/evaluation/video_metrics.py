"""Measures of videos alone: temporal smoothness, and PSNR and SSIM of a VAE's reconstructions.

C channels, T frames, H W pixels; videos [C, T, H, W] in [-1, 1].
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_data.clip import Clip
from stdit_model import video_vae
from stdit_train.errors import ConfigError
from stdit_train.evaluation.confidence import Interval, mean_interval

RANGE = 2.0  # of pixel values
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels
MAX_PSNR = 100.0  # dB, of an exact reconstruction


class Measure(Protocol):
    """Measures videos as they are generated."""

    def add(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> None:
        """Add videos [C, T, H, W] in [-1, 1] and their prompts."""

    def result(self) -> dict[str, Interval]:
        """Return the values by the measures' names."""


class Smoothness:
    """Temporal smoothness: means of `change` and `flicker` over videos."""

    def __init__(self) -> None:
        self._changes: list[float] = []
        self._flickers: list[float] = []

    def add(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> None:
        """Add videos [C, T, H, W]; those of fewer than three frames have no flicker and are left out."""
        for video in videos:
            if video.shape[1] >= 3:
                self._changes.append(change(video))
                self._flickers.append(flicker(video))

    def result(self) -> dict[str, Interval]:
        """Return the means over videos; nothing where none was long enough."""
        if not self._changes:
            return {}
        return {"change": mean_interval(self._changes), "flicker": mean_interval(self._flickers)}


def change(video: Tensor) -> float:
    """Return the root mean square difference of neighbouring frames, as a share of the pixels' range (0..1)."""
    return (video.float().diff(dim=1).square().mean().sqrt() / RANGE).item()


def flicker(video: Tensor) -> float:
    """Return the root mean square of the second difference over time, divided by that of the first.

    It is 0 for a still video or an even fade, √3 for frames of independent noise and 2 for frames that alternate.
    """
    first = video.float().diff(dim=1)
    size = first.square().mean().sqrt().item()
    return first.diff(dim=1).square().mean().sqrt().item() / size if size > 1e-6 else 0.0


def psnr(video: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB over all pixels of a clip; 100 where the clips are equal."""
    error = F.mse_loss(video.float(), reference.float()).item()
    return min(MAX_PSNR, 10 * math.log10(RANGE**2 / error)) if error > 0 else MAX_PSNR


def ssim(video: Tensor, reference: Tensor) -> float:
    """Return the structural similarity (Wang et al. 2004, eq. 13), mean over channels, frames and whole windows.

    Raises:
        ConfigError: frames are smaller than the window of 11 pixels.
    """
    if min(video.shape[-2:]) < WINDOW:
        raise ConfigError(f"SSIM's window is {WINDOW} pixels wide: frames of {tuple(video.shape[-2:])} are too small")
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


def reconstruction(vae: Any, clips: Iterable[Clip], measures: Sequence[Measure] = ()) -> dict[str, Interval]:
    """Return PSNR and SSIM of clips after a VAE has encoded (to the mean) and decoded them.

    What `measures` find in the decoded clips is the most that a model with this VAE can reach; it comes under their
    names with "VAE " in front.
    """
    ratios, similarities = [], []
    device = next(vae.parameters()).device
    for clip in clips:
        latents = video_vae.sample_latents(vae, video_vae.encode_moments(vae, clip.video[None].to(device)))
        again = video_vae.decode(vae, latents, frames=clip.video.shape[1])[0].cpu()
        ratios.append(psnr(again, clip.video))
        similarities.append(ssim(again, clip.video))
        for measure in measures:
            measure.add([again], [clip.caption])
    found = {name: interval for measure in measures for name, interval in measure.result().items()}
    result = {"PSNR (dB)": mean_interval(ratios), "SSIM": mean_interval(similarities)} | found
    return {f"VAE {name}": interval for name, interval in result.items()}
