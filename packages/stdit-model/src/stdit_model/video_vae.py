"""Encode and decode video with any diffusers VAE: image VAEs frame by frame, video VAEs with their strides.

Legend: B batch, C channels, T frames, H W pixels; the latents' axes are named the same way.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from stdit_model.errors import SettingsError
from stdit_model.protocols import VAE


def is_temporal(vae: VAE) -> bool:
    """Whether the VAE takes clips [B, C, T, H, W] (3-D convolutions) rather than single frames."""
    return any(parameter.ndim == 5 for parameter in vae.parameters())


def latent_shape(vae: VAE, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return channels, frames, height and width of the latents of a clip.

    Raises:
        SettingsError: a size that is no multiple of the VAE's stride; the message has the nearest ones.
    """
    spatial = spatial_stride(vae)
    for name, size in (("height", height), ("width", width)):
        if size % spatial or size <= 0:
            low = max(spatial, size // spatial * spatial)
            raise SettingsError(f"{name} {size} is not a multiple of {spatial}: take {low} or {low + spatial}")
    return vae.config.latent_channels, latent_frames(vae, frames), height // spatial, width // spatial


def spatial_stride(vae: VAE) -> int:
    """Return the number of pixels per latent along height and width."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def covering_size(vae: VAE, patch: tuple[int, int, int], height: int, width: int) -> tuple[int, int]:
    """Return the smallest multiples of VAE stride and patch that cover a height and width, to be cropped afterwards."""
    units = (spatial_stride(vae) * patch[1], spatial_stride(vae) * patch[2])
    return -(-height // units[0]) * units[0], -(-width // units[1]) * units[1]


def latent_frames(vae: VAE, frames: int) -> int:
    """Return the number of latent frames of a number of pixel frames."""
    temporal = vae.config.get("temporal_compression_ratio", 4) if is_temporal(vae) else 1
    return (frames - 1) // temporal + 1


def encode_moments(vae: VAE, video: Tensor, chunk: int = 16) -> Tensor:
    """Encode video to the posterior's mean and log variance, [B, 2C, T, H, W], not normalised.

    Args:
        vae: AutoencoderKL, or a diffusers video VAE.
        video: [B, 3, T, H, W] in [-1, 1].
        chunk: frames that an image VAE encodes at once.
    """
    with torch.no_grad():
        if is_temporal(vae):
            return vae.encode(video.to(vae.dtype)).latent_dist.parameters
        frames = rearrange(video, "b c t h w -> (b t) c h w").to(vae.dtype)
        moments = torch.cat([vae.encode(part).latent_dist.parameters for part in frames.split(chunk)])
        return rearrange(moments, "(b t) c h w -> b c t h w", b=len(video))


def sample_latents(vae: VAE, moments: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return normalised latents [B, C, T, H, W] from moments: a sample of the posterior, or its mean without noise."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    if noise is not None:
        mean = mean + noise * torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    shift, scale = _normalisation(vae, mean)
    return (mean - shift) * scale


def decode(vae: VAE, latents: Tensor, chunk: int = 16) -> Tensor:
    """Decode normalised latents [B, C, T, H, W] to video [B, 3, T, H, W] in [-1, 1], float32.

    An image VAE decodes `chunk` frames at once, in channels-last layout, into one buffer for all of them.
    """
    shift, scale = _normalisation(vae, latents)
    latents = (latents / scale + shift).to(vae.dtype)
    with torch.no_grad():
        if is_temporal(vae):
            return vae.decode(latents).sample.float().clamp(-1.0, 1.0)
        frames = rearrange(latents, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        video: Tensor | None = None
        for start in range(0, len(frames), chunk):
            part = vae.decode(frames[start : start + chunk]).sample
            if video is None:
                video = part.new_empty(len(frames), *part.shape[1:], dtype=torch.float32)
            video[start : start + chunk] = part
    assert video is not None  # there is at least one frame
    return rearrange(video.clamp_(-1.0, 1.0), "(b t) c h w -> b c t h w", b=len(latents))


def _normalisation(vae: VAE, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale [1, C, 1, 1, 1]: per channel where the VAE's config has statistics, else its scaling factor.

    sd-vae-ft: (z - 0) * 0.18215.
    """
    config = vae.config

    def per_channel(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=latents.device).reshape(1, -1, 1, 1, 1)

    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return per_channel(config.latents_mean), config.scaling_factor / per_channel(config.latents_std)
    return per_channel(config.get("shift_factor") or 0.0), per_channel(config.scaling_factor)
