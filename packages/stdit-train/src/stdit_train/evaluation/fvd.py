"""Fréchet video distance (FVD) of generated videos from real ones, in the features of a video network.

Unterthiner et al. 2018. Features come from an I3D saved as TorchScript, or from a video model of transformers.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from stdit_model.weights.hub import hub_options, hub_reason
from stdit_train.components.load import quiet_libraries
from stdit_train.errors import ConfigError
from stdit_train.evaluation.confidence import Interval

Features = Callable[[Tensor], Tensor]  # video [3, T, H, W] in [-1, 1] to [F]
I3D_SIZE = 224  # pixels
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet by channel, as VideoMAE expects


class FrechetDistance:
    """FVD of the videos that are added from reference videos.

    Args:
        features: returns the features of one video.
        references: two or more real videos [3, T, H, W] in [-1, 1].

    Raises:
        ConfigError: there are fewer than two references.
    """

    def __init__(self, features: Features, references: Iterable[Tensor]) -> None:
        self.features = features
        self._real = [features(video) for video in references]
        if len(self._real) < 2:
            raise ConfigError("--fvd compares two or more videos with as many real clips: raise --prompts, give more")
        self._made: list[Tensor] = []

    def add(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> None:
        """Add generated videos [3, T, H, W] in [-1, 1]; prompts make no difference."""
        self._made += [self.features(video) for video in videos]

    def result(self) -> dict[str, Interval]:
        """Return the distance, without an interval since it is one number for all videos; nothing below two videos."""
        if min(len(self._made), len(self._real)) < 2:
            return {}
        made, real = (torch.stack(features).double().cpu().numpy() for features in (self._made, self._real))
        return {"FVD": Interval(frechet_distance(made, real), None, len(made))}


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½) of the Gaussians fitted to two sets of features.

    The trace of the root is the sum of the singular values of A Bᵀ, where S1 = AᵀA and S2 = BᵀB: with features as
    rows, centred and over √(n - 1), no root of a nearly singular matrix is taken.

    Args:
        first, second: features [n, F] and [m, F], two or more of each.
    """
    mean = first.mean(0) - second.mean(0)
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (first, second))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(mean @ mean + (a**2).sum() + (b**2).sum() - 2 * root, 0.0))


def load_features(source: str, device: torch.device) -> Features:
    """Load a feature extractor from a TorchScript file, or a video model of transformers from a folder or a Hub id.

    A TorchScript file runs code: give only one that you trust. It takes videos [1, 3, T, 224, 224] in [-1, 1] and
    returns features. The arguments `rescale`, `resize` and `return_features` of the common I3D files are set to match
    where the file has them.

    Raises:
        ConfigError: it cannot be loaded.
    """
    path = Path(source).expanduser()
    if path.is_file():
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # raised by jit.load itself
                module = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise ConfigError(f"--fvd {source}: not a TorchScript file") from error
        return _scripted(module, source, device)
    if path.suffix in (".pt", ".pth", ".jit", ".ts"):
        raise ConfigError(f"--fvd {source}: no such file")
    from transformers import AutoModel

    quiet_libraries()
    try:
        model = AutoModel.from_pretrained(source, **hub_options(source))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"--fvd {source}: no TorchScript file and no model of transformers ({hub_reason(error, source)})"
        ) from error
    if not hasattr(model.config, "num_frames"):
        raise ConfigError(f"--fvd {source}: a {type(model).__name__} takes no videos; try MCG-NJU/videomae-base")
    return _video_model(model.to(device).eval(), device)


def _scripted(module: Any, source: str, device: torch.device) -> Features:
    known = {argument.name for argument in module.forward.schema.arguments}
    options = {"rescale": False, "resize": False, "return_features": True}
    options = {name: value for name, value in options.items() if name in known}

    @torch.no_grad()
    def features(video: Tensor) -> Tensor:
        resized = _resized(video, I3D_SIZE)[None].to(device)
        try:
            return module(resized, **options).flatten()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(f"--fvd {source}: it cannot take videos {list(resized.shape)} ({reason})") from error

    return features


def _video_model(model: Any, device: torch.device) -> Features:
    mean, deviation = (torch.tensor(values)[:, None, None, None] for values in (MEAN, DEVIATION))

    @torch.no_grad()
    def features(video: Tensor) -> Tensor:
        steps = torch.linspace(0, video.shape[1] - 1, model.config.num_frames).round().long()
        pixels = (_resized(video[:, steps], model.config.image_size) + 1) / 2
        pixels = ((pixels - mean) / deviation).transpose(0, 1)[None]  # [1, T, 3, H, W]
        return model(pixel_values=pixels.to(device)).last_hidden_state.mean(1).flatten()

    return features


def _resized(video: Tensor, size: int) -> Tensor:
    """Resize [3, T, H, W] to [3, T, size, size], whatever its aspect ratio."""
    frames = video.float().cpu().transpose(0, 1)
    return F.interpolate(frames, (size, size), mode="bilinear", antialias=True, align_corners=False).transpose(0, 1)
