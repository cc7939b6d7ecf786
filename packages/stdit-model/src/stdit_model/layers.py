"""The layers of a block: attention, MLP and modulation; and the final layer.

Legend: B batch, T frames, S tokens per frame, L sequence or text length, D width, N heads, K head width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Modulate x by adaLN (DiT, section 3.2): x * (1 + scale) + shift, all in x's dtype."""
    return torch.addcmul(shift, x, 1 + scale)


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Add a gated update to the residual stream: x + gate * update, all in x's dtype."""
    return torch.addcmul(x, gate, update)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute scaled dot-product attention, with torch's kernels: q [B, N, L, K], k and v [B, N, M, K] -> [B, N, L, K].

    Args:
        q, k, v: queries, keys and values.
        mask: bool, broadcast to [B, N, L, M], True for what is attended to; None for all.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class LayerNorm(nn.LayerNorm):
    """Layer norm without affine parameters (eps 1e-6): adaLN supplies shift and scale. Keeps its input's dtype.

    Statistics are float32 in any dtype. Autocast would convert input and output to float32, too, so the operator
    that it does not know is called.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_layer_norm(x, self.normalized_shape, None, None, self.eps)[0]


class SelfAttention(nn.Module):
    """Multi-head self-attention over the second-last axis: [B, L, D] -> [B, L, D]; qkv with bias, no qk-norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x_BLD), "b l (three n k) -> three b n l k", three=3, n=self.num_heads)
        x_BNLK = attention(q, k, v)
        return self.proj(rearrange(x_BNLK, "b n l k -> b l (n k)"))


class SpatialAttention(SelfAttention):
    """Attention within each frame: [B, T, S, D] -> [B, T, S, D]."""

    def forward(self, x_BTSD: Tensor) -> Tensor:
        frames = x_BTSD.shape[1]
        x = super().forward(rearrange(x_BTSD, "b t s d -> (b t) s d"))
        return rearrange(x, "(b t) s d -> b t s d", t=frames)


class TemporalAttention(SelfAttention):
    """Attention across frames at each position: [B, T, S, D] -> [B, T, S, D].

    It adds temporal positions [T, D], if given, itself: under sequence parallelism only here all frames are present.
    """

    def forward(self, x_BTSD: Tensor, position_TD: Tensor | None = None) -> Tensor:
        tokens = x_BTSD.shape[2]
        if position_TD is not None:
            x_BTSD = x_BTSD + position_TD[:, None].to(x_BTSD.dtype)
        x = super().forward(rearrange(x_BTSD, "b t s d -> (b s) t d"))
        return rearrange(x, "(b s) t d -> b t s d", s=tokens)


class FullAttention(SelfAttention):
    """Attention over all tokens of the clip at once: [B, T, S, D] -> [B, T, S, D]; cost grows with (T*S)^2."""

    def forward(self, x_BTSD: Tensor) -> Tensor:
        frames = x_BTSD.shape[1]
        x = super().forward(rearrange(x_BTSD, "b t s d -> b (t s) d"))
        return rearrange(x, "b (t s) d -> b t s d", t=frames)


class CrossAttention(nn.Module):
    """Attention to the caption: [B, T, S, D] -> [B, T, S, D]; keys and values come from `keys_values`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the caption's keys and values, each [B, N, L, K]."""
        k, v = rearrange(self.kv_linear(text_BLD), "b l (two n k) -> two b n l k", two=2, n=self.num_heads)
        return k, v

    def forward(self, x_BTSD: Tensor, keys_values: tuple[Tensor, Tensor], mask_BL: Tensor | None) -> Tensor:
        k, v = keys_values
        frames = x_BTSD.shape[1]
        q = rearrange(self.q_linear(x_BTSD), "b t s (n k) -> b n (t s) k", n=self.num_heads)
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        x_BNLK = attention(q, k, v, mask)
        return self.proj(rearrange(x_BNLK, "b n (t s) k -> b t s (n k)", t=frames))


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between: [..., in] -> [..., out]."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Modulated layer norm and projection to patches: [B, T, S, D] -> [B, T, S, patch volume * out channels]."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(width)
        self.linear = nn.Linear(width, out_features)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x_BTSD: Tensor, t_BD: Tensor) -> Tensor:
        vectors = (self.scale_shift_table.float() + t_BD[:, None]).to(x_BTSD.dtype)
        shift, scale = vectors[:, :, None, None].unbind(1)  # [B, 1, 1, D] each
        return self.linear(modulate(self.norm_final(x_BTSD), shift, scale))
