"""Encoder and decoder of the causal video VAE, with the names that AutoencoderKL's layers have.

B batch, C channels, T frames, H W height and width.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

EPS = 1e-6  # of the norms, as in AutoencoderKL
Past = dict[nn.Module, Tensor]  # the last input frames of each convolution, from one chunk to the next


class CausalConv3d(nn.Conv3d):
    """A convolution over the frame and those before it; before the first frame stands the first frame."""

    def __init__(self, channels: int, out: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        same = kernel // 2 if stride[1] == 1 else 0  # strided ones are padded outside, at one side
        super().__init__(channels, out, kernel, stride, padding=(0, same, same))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        reach = self.kernel_size[0] - 1
        before = x[:, :, :1].expand(-1, -1, reach, -1, -1) if past is None or self not in past else past[self]
        x = torch.cat([before, x], dim=2)
        if past is not None:
            past[self] = x[:, :, x.shape[2] - (self.kernel_size[0] - self.stride[0]) :].clone()
        return super().forward(x)


class FrameNorm(nn.GroupNorm):
    """Group normalisation of each frame by itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(y, "(b t) c h w -> b c t h w", b=len(x))


class FrameAttention(nn.Module):
    """Self-attention of each frame by itself, with one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = FrameNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, h = len(x), x.shape[-2]
        y = rearrange(self.group_norm(x), "b c t h w -> (b t) 1 (h w) c")
        y = self.to_out[0](F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y)))
        return x + rearrange(y, "(b t) 1 (h w) c -> b c t h w", b=b, h=h)


class ResnetBlock(nn.Module):
    """Two causal convolutions around the identity."""

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(groups, channels, EPS), CausalConv3d(channels, out)
        self.norm2, self.conv2 = FrameNorm(groups, out, EPS), CausalConv3d(out, out)
        self.conv_shortcut = nn.Conv3d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), past)
        y = self.conv2(F.silu(self.norm2(y)), past)
        return cast(Tensor, self.conv_shortcut(x) + y)


class Downsample(nn.Module):
    """Halve height and width, and with `temporal` the frames: 1 + 2k become 1 + k."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=(2 if temporal else 1, 2, 2))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1)), past))


class Upsample(nn.Module):
    """Double height and width, and with `temporal` the frames: 1 + k become 1 + 2k."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.conv = CausalConv3d(channels, channels * (2 if temporal else 1))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        begins = past is None or self.conv not in past
        x = self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"), past)
        if not self.temporal:
            return x
        x = rearrange(x, "b (two c) t h w -> b c (t two) h w", two=2)
        return x[:, :, 1:] if begins else x


class Level(nn.Module):
    """The layers at one size: blocks, then a change of size where there is one."""

    def __init__(self, channels: int, out: int, layers: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels if i == 0 else out, out, groups) for i in range(layers)])


class Middle(nn.Module):
    """Block, attention, block at the smallest size."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])


class _Half(nn.Module):
    """Encoder or decoder: what they share."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = None
    mid_block: Middle
    conv_in: CausalConv3d
    conv_out: CausalConv3d
    conv_norm_out: FrameNorm

    def _block(self, block: nn.Module, x: Tensor, past: Past | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled() and past is None:
            return cast(Tensor, self._gradient_checkpointing_func(block, x))
        return cast(Tensor, block(x, past))

    def _middle(self, x: Tensor, past: Past | None) -> Tensor:
        first, second = self.mid_block.resnets
        x = self._block(first, x, past)
        for attention in self.mid_block.attentions:
            x = attention(x)
        return self._block(second, x, past)

    def _last(self, x: Tensor, past: Past | None) -> Tensor:
        return cast(Tensor, self.conv_out(F.silu(self.conv_norm_out(x)), past))


class Encoder(_Half):
    """Frames [B, 3, T, H, W] to moments before the last 1x1 convolution, [B, 2C, 1 + (T - 1) / r, H / s, W / s]."""

    def __init__(
        self, channels: int, out: int, widths: tuple[int, ...], layers: int, groups: int, attention: bool, halvings: int
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(channels, widths[0])
        self.down_blocks = nn.ModuleList()
        last = len(widths) - 1
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, layers, groups)
            if i < last:
                level.downsamplers = nn.ModuleList([Downsample(width, temporal=i >= last - halvings)])
            self.down_blocks.append(level)
        self.mid_block = Middle(widths[-1], groups, attention)
        self.conv_norm_out, self.conv_out = FrameNorm(groups, widths[-1], EPS), CausalConv3d(widths[-1], out)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = self.conv_in(x, past)
        level: Any  # mypy takes an attribute of a module for a tensor
        for level in self.down_blocks:
            for block in cast(Level, level).resnets:
                x = self._block(block, x, past)
            for change in getattr(level, "downsamplers", ()):
                x = change(x, past)
        return self._last(self._middle(x, past), past)


class Decoder(_Half):
    """Latents [B, C, 1 + k, h, w] to frames [B, 3, 1 + r k, s h, s w]."""

    def __init__(
        self, channels: int, out: int, widths: tuple[int, ...], layers: int, groups: int, attention: bool, halvings: int
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(channels, widths[-1])
        self.mid_block = Middle(widths[-1], groups, attention)
        self.up_blocks = nn.ModuleList()
        last = len(widths) - 1
        for i, width in enumerate(reversed(widths)):
            level = Level(widths[min(last - i + 1, last)], width, layers + 1, groups)
            if i < last:
                level.upsamplers = nn.ModuleList([Upsample(width, temporal=i < halvings)])
            self.up_blocks.append(level)
        self.conv_norm_out, self.conv_out = FrameNorm(groups, widths[0], EPS), CausalConv3d(widths[0], out)

    def forward(self, z: Tensor, past: Past | None = None) -> Tensor:
        x = self._middle(self.conv_in(z, past), past)
        level: Any  # mypy takes an attribute of a module for a tensor
        for level in self.up_blocks:
            for block in cast(Level, level).resnets:
                x = self._block(block, x, past)
            for change in getattr(level, "upsamplers", ()):
                x = change(x, past)
        return self._last(x, past)
