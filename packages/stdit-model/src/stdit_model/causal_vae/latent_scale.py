"""What latents are normalised by, before a model sees them."""

from typing import Any

import torch
from torch import Tensor

STATISTICS = ("latents_mean", "latents_std")  # in the configuration, or buffers


def normalisation(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return shift and scale [1, C, 1, 1, 1] of latents z, which are normalised to (z - shift) * scale.

    They are the VAE's statistics of each channel where it has some, else its scaling factor: sd-vae-ft's 0.18215.
    """
    config = vae.config
    mean, std = (config[name] if name in config else getattr(vae, name, None) for name in STATISTICS)
    scale = config.get("scaling_factor", 1.0)

    def per_channel(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=latents.device).reshape(1, -1, 1, 1, 1)

    if mean is not None and std is not None:
        return per_channel(mean), scale / per_channel(std)
    return per_channel(config.get("shift_factor") or 0.0), per_channel(scale)
