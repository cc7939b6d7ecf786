"""Embeddings of latents, timesteps, captions and positions.

Legend: B batch, C channels, T frames, H W height and width (of the token grid), S = H*W tokens per frame,
L text tokens, D width.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stdit_model.layers import Mlp
from stdit_model.tables import device_table

CPU = torch.device("cpu")
FREQUENCY_CHANNELS = 256  # width of the sinusoidal timestep embedding (Dhariwal & Nichol 2021)


def timestep_embedding(timestep_B: Tensor, channels: int = FREQUENCY_CHANNELS) -> Tensor:
    """Embed diffusion timesteps as sinusoids: [B] -> float32 [B, channels], cosines first.

    Always float32: bfloat16 cannot represent all integers above 256.
    """
    half = channels // 2
    frequency = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=timestep_B.device))
    angle = timestep_B.float()[:, None] * frequency[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def _sincos(channels: int, position: np.ndarray) -> np.ndarray:
    """[P] positions -> [P, channels]: sines, then cosines, of frequencies 1/10000^(2i/channels); float64."""
    frequency = 1.0 / 10000.0 ** (np.arange(channels // 2, dtype=np.float64) / (channels / 2))
    angle = position.reshape(-1).astype(np.float64)[:, None] * frequency[None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def _spatial_table(channels: int, height: int, width: int, space_scale: float) -> np.ndarray:
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    halves = [_sincos(channels // 2, axis / space_scale) for axis in (column, row)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def _temporal_table(channels: int, frames: int, time_scale: float) -> np.ndarray:
    return _sincos(channels, np.arange(frames) / time_scale).astype(np.float32)


_spatial = device_table("spatial_positions", _spatial_table, lambda channels, height, width: (height * width, channels))
_temporal = device_table("temporal_positions", _temporal_table, lambda channels, frames: (frames, channels))


def spatial_positions(
    channels: int,
    height: int,
    width: int,
    space_scale: float = 1.0,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Embed the positions of a token grid by fixed 2-D sinusoids, [S, D], row by row.

    Positions are index / space_scale (Open-Sora 1.0: 0.5 at 256 pixels, 1 at 512), so that one set of weights
    serves any grid. The first half of D encodes the column, the second the row; computed in float64, rounded to
    float32. The table is kept on the device, and is not to be changed.
    """
    return _spatial((channels, height, width), float(space_scale), device, dtype)


def temporal_positions(
    channels: int,
    frames: int,
    time_scale: float = 1.0,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Embed the positions of frames by fixed 1-D sinusoids, [T, D]; positions are index / time_scale.

    Like `spatial_positions`, the table is kept on the device, and is not to be changed.
    """
    return _temporal((channels, frames), float(time_scale), device, dtype)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever the dtype of its weights and autocast.

    Used for timesteps, which differ by less than bfloat16 resolves.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class PatchEmbed3D(nn.Module):
    """Non-overlapping 3-D patches to tokens: [B, C, T, H, W] -> [B, T', S, D], frame by frame, row by row."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        # contiguous: else all later activations inherit the strides of channels first, and adding them is slow
        return rearrange(self.proj(x_BCTHW), "b d t h w -> b t (h w) d").contiguous()


class TimestepEmbedder(nn.Module):
    """Timesteps [B] to float32 vectors [B, D]: sinusoid, then a two-layer SiLU MLP (DiT, section 3.2)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Float32Linear(FREQUENCY_CHANNELS, hidden_size), nn.SiLU(), Float32Linear(hidden_size, hidden_size)
        )

    def forward(self, timestep_B: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(timestep_B))


class CaptionEmbedder(nn.Module):
    """Text-encoder states [B, L, Dc] to width [B, L, D], and the null caption that stands for "no text".

    The null caption [model_max_length, Dc] is a buffer, drawn once and saved with the weights (PixArt-alpha).
    """

    y_embedding: Tensor

    def __init__(self, caption_channels: int, hidden_size: int, model_max_length: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)
        self.register_buffer("y_embedding", torch.randn(model_max_length, caption_channels) / caption_channels**0.5)

    def forward(self, y_BLC: Tensor, null_B: Tensor | None = None) -> Tensor:
        """Project captions, those of the rows in null_B (bool) replaced by the null caption."""
        if null_B is not None:
            y_BLC = torch.where(null_B[:, None, None], self.null(y_BLC.shape[1]).to(y_BLC), y_BLC)
        return self.y_proj(y_BLC)

    def null(self, length: int) -> Tensor:
        """Return the first tokens of the null caption, [L, Dc].

        Raises:
            ValueError: `length` is above its own.
        """
        if length > len(self.y_embedding):
            own = len(self.y_embedding)
            raise ValueError(f"a null caption of {length} tokens: this model has {own} (model_max_length)")
        return self.y_embedding[:length]
