"""Encode and decode video with diffusers' VAEs: image VAEs frame by frame, video VAEs with their strides.

A video VAE makes a latent of the first frame and one of each `temporal_stride` frames after it. Other numbers of frames
are rounded up: the last frame is repeated for encoding, and the video is cut after decoding.

Legend: B batch, C channels, T frames, H W pixels; the latents' axes are named the same way.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stdit_model.causal_vae.latent_counts import covering_latents, latents_at_once
from stdit_model.causal_vae.latent_scale import normalisation
from stdit_model.causal_vae.quantization import NO_VARIANCE
from stdit_model.errors import SettingsError
from stdit_model.protocols import VAE

# diffusers' VAEs that are tested here. A class of one's own needs no line.
IMAGE_VAES = (
    "AutoencoderKL",
    "AsymmetricAutoencoderKL",
    "AutoencoderTiny",
    "AutoencoderDC",
    "AutoencoderKLTemporalDecoder",
)
VIDEO_VAES = (
    "AutoencoderKLWan",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLMochi",
)


def check_vae(vae: VAE) -> None:
    """Check that a VAE is one of those that work here, or not of diffusers.

    Raises:
        SettingsError: another one of diffusers' VAEs.
    """
    kind = type(vae)
    if kind.__module__.startswith("diffusers.") and kind.__name__ not in IMAGE_VAES + VIDEO_VAES:
        raise SettingsError(
            f"a VAE of diffusers' {kind.__name__} cannot be used: take {', '.join(VIDEO_VAES)}, or for "
            f"single frames {', '.join(IMAGE_VAES)}"
        )
    if vae.config.get("timestep_conditioning"):
        raise SettingsError(f"a {kind.__name__} whose decoder takes a timestep cannot be used: take one without")


def is_temporal(vae: VAE) -> bool:
    """Whether the VAE takes clips [B, C, T, H, W] (3-D convolutions in its encoder) rather than single frames."""
    return any(parameter.ndim == 5 for parameter in getattr(vae, "encoder", vae).parameters())


def latent_channels(vae: VAE) -> int:
    """Return the number of channels C of the latents."""
    return int(vae.config.get("latent_channels") or vae.config.z_dim)


def spatial_stride(vae: VAE) -> int:
    """Return the number of pixels per latent along height and width."""
    return _stride(vae, "spatial") or 2 ** (len(vae.config.block_out_channels) - 1)


def temporal_stride(vae: VAE) -> int:
    """Return the number of frames per latent after the first one; 1 for image VAEs."""
    return _stride(vae, "temporal") or 4 if is_temporal(vae) else 1


def latent_shape(vae: VAE, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return channels, frames, height and width of the latents of a clip.

    Raises:
        SettingsError: a size that is no multiple of the VAE's stride; the message has the nearest ones. Or a VAE that
            cannot be used.
    """
    check_vae(vae)
    spatial = spatial_stride(vae)
    for name, size in (("height", height), ("width", width)):
        if size % spatial or size <= 0:
            low = max(spatial, size // spatial * spatial)
            raise SettingsError(f"{name} {size} is not a multiple of {spatial}: take {low} or {low + spatial}")
    return latent_channels(vae), latent_frames(vae, frames), height // spatial, width // spatial


def covering_size(vae: VAE, patch: tuple[int, int, int], height: int, width: int) -> tuple[int, int]:
    """Return the smallest multiples of VAE stride and patch that cover a height and width, to be cropped afterwards."""
    units = (spatial_stride(vae) * patch[1], spatial_stride(vae) * patch[2])
    return -(-height // units[0]) * units[0], -(-width // units[1]) * units[1]


def latent_frames(vae: VAE, frames: int) -> int:
    """Return the number of latent frames that cover a number of pixel frames."""
    return covering_latents(frames, temporal_stride(vae), latents_at_once(type(vae).__name__))


def whole_latent_frames(vae: VAE, frames: int) -> int:
    """Return the number of latent frames that come from the first pixel frames alone."""
    return (frames - 1) // temporal_stride(vae) + 1


def encode_moments(vae: VAE, video: Tensor, chunk: int = 16) -> Tensor:
    """Encode video to the posterior's mean and log variance, [B, 2C, T, H, W], not normalised.

    An image VAE encodes `chunk` frames at once, in channels-last layout.

    Args:
        vae: one of `IMAGE_VAES` or `VIDEO_VAES`.
        video: [B, 3, T, H, W] in [-1, 1].
        chunk: frames that an image VAE encodes at once.
    """
    with torch.no_grad():
        if is_temporal(vae):
            frames = video.shape[2]
            missing = (latent_frames(vae, frames) - 1) * temporal_stride(vae) + 1 - frames
            video = F.pad(video, (0, 0, 0, 0, 0, missing), mode="replicate") if missing else video
            return _moments(vae.encode(video.to(vae.dtype)))
        frames_BCHW = rearrange(video, "b c t h w -> (b t) c h w").to(vae.dtype, memory_format=torch.channels_last)
        moments = torch.cat([_moments(vae.encode(part)) for part in frames_BCHW.split(chunk)]).contiguous()
        return rearrange(moments, "(b t) c h w -> b c t h w", b=len(video))


def sample_latents(vae: VAE, moments: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return normalised latents [B, C, T, H, W] from moments: a sample of the posterior, or its mean without noise."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    if noise is not None:
        mean = mean + noise * torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    shift, scale = normalisation(vae, mean)
    return (mean - shift) * scale


def decode(vae: VAE, latents: Tensor, chunk: int = 16, frames: int | None = None) -> Tensor:
    """Decode normalised latents [B, C, T, H, W] to video [B, 3, T, H, W] in [-1, 1], float32.

    An image VAE decodes `chunk` frames at once, in channels-last layout, into one buffer for all of them.

    Args:
        vae: one of `IMAGE_VAES` or `VIDEO_VAES`.
        latents: as `sample_latents` returns them.
        chunk: frames that an image VAE decodes at once.
        frames: of the video, where the latents cover more. [default: all]
    """
    shift, scale = normalisation(vae, latents)
    latents = (latents / scale + shift).to(vae.dtype)
    with torch.no_grad():
        if is_temporal(vae):
            return vae.decode(latents).sample[:, :, :frames].float().clamp(-1.0, 1.0)
        across_time = type(vae).__name__ == "AutoencoderKLTemporalDecoder"  # decodes frames of one clip together
        if across_time:
            video = torch.cat([_decode_frames(vae, one, chunk, across_time) for one in latents.split(1)])
        else:
            video = _decode_frames(vae, latents, chunk)
    return rearrange(video.clamp_(-1.0, 1.0), "(b t) c h w -> b c t h w", b=len(latents))


def _decode_frames(vae: VAE, latents: Tensor, chunk: int, across_time: bool = False) -> Tensor:
    """Decode latents [B, C, T, H, W] with an image VAE to frames [B * T, 3, H, W], float32."""
    frames = rearrange(latents, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
    video: Tensor | None = None
    decoder: Any = vae  # with an argument of its own, if across time
    for start in range(0, len(frames), chunk):
        z = frames[start : start + chunk]
        part = (decoder.decode(z, num_frames=len(z)) if across_time else vae.decode(z)).sample
        if video is None:
            video = part.new_empty(len(frames), *part.shape[1:], dtype=torch.float32)
        video[start : start + chunk] = part
    assert video is not None  # there is at least one frame
    return video


def _moments(encoded: Any) -> Tensor:
    """Mean and log variance [B, 2C, ...] of what an encoder returns."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.parameters
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return torch.cat([latents, torch.full_like(latents, NO_VARIANCE)], dim=1)


def _stride(vae: VAE, axis: str) -> int | None:
    """Stride along time or space as a video VAE says it: Wan, Hunyuan and CogVideoX, or the others."""
    config = vae.config
    found = config.get(f"scale_factor_{axis}") or config.get(f"{axis}_compression_ratio")
    return found or getattr(vae, f"{axis}_compression_ratio", None)
