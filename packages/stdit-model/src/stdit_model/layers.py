"""The layers of a block: attention, MLP and modulation; and the final layer.

A block computes the caption's keys and values in its own forward, before which offloading brings the block's weights.
They do not depend on the timestep, so a sampler keeps them from step to step in a `TextCache`.

Legend: B batch, T frames, S tokens per frame, L sequence or text length, D width, N heads, K head width.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
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


def split_heads(x_BLD: Tensor, parts: int, num_heads: int) -> list[Tensor]:
    """Split a joint projection, [B, L, parts * D], into what it holds by heads: `parts` times [B, N, L, K].

    Parts first: the backward then writes their gradients side by side in one pass, where that of a rearrangement
    with an axis for the parts writes them twice.
    """
    return [rearrange(x, "b l (n k) -> b n l k", n=num_heads) for x in x_BLD.chunk(parts, dim=-1)]


class AttentionKernel:
    """Attention with torch's choice of kernel, or with the one that `STDiT.set_attention_backend` names.

    It is what diffusers calls a processor, and finds by these two attributes.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute `attention`."""
        if self._attention_backend is None:
            return attention(q, k, v, mask)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # diffusers' layout is [B, L, N, K]
        return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self._attention_backend).transpose(1, 2)


class LayerNorm(nn.LayerNorm):
    """Layer norm without affine parameters (eps 1e-6): adaLN supplies shift and scale. Keeps its input's dtype.

    Statistics are float32 in any dtype. Autocast would convert input and output to float32, too, so the operator
    that it does not know is called.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_layer_norm(x, self.normalized_shape, None, None, self.eps)[0]


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention over the second-last axis: [B, L, D] -> [B, L, D]; qkv with bias, no qk-norm."""

    is_cross_attention = False  # for diffusers' caches
    _supports_qkv_fusion = False  # it is one layer already

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.processor = AttentionKernel()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x_BLD), 3, self.num_heads)
        x_BNLK = self.processor(q, k, v)
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


@dataclass(eq=False)
class BlockText:
    """The caption for one block: its states [B, L, D], or once computed its keys and values, each [B, N, L, K]."""

    states_BLD: Tensor | None
    keys_values: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device, **options: Any) -> Self:
        """Move in place to a device, as offloading and device maps do with the arguments of a block."""
        self.states_BLD = None if self.states_BLD is None else self.states_BLD.to(device, **options)
        if self.keys_values is not None:
            keys, values = self.keys_values
            self.keys_values = keys.to(device, **options), values.to(device, **options)
        return self

    def last(self, batch: int) -> "BlockText":
        """Return the last captions."""
        states, pair = self.states_BLD, self.keys_values
        return BlockText(
            None if states is None else states[-batch:], None if pair is None else (pair[0][-batch:], pair[1][-batch:])
        )


@dataclass(eq=False)
class TextCache:
    """A caption whose keys and values are computed once, by the first call of the model that it is passed to.

    Attributes:
        y_BLC: text-encoder states [B, L, caption_channels], until that call.
        mask_BL: bool, True for tokens that are attended to; None for all.
        null_B: bool, True for captions to be replaced by the model's null caption; None for none.
        blocks: what is kept for each block, from that call on.
    """

    y_BLC: Tensor | None
    mask_BL: Tensor | None = None
    null_B: Tensor | None = None
    blocks: list[BlockText] = field(default_factory=list)
    _last: dict[int, "TextCache"] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device, **options: Any) -> Self:
        """Move in place to a device, as offloading does with the arguments of a model."""
        for name in ("y_BLC", "mask_BL", "null_B"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device, **options))
        self.blocks = [block.to(device, **options) for block in self.blocks]
        return self

    def last(self, batch: int) -> "TextCache":
        """Return the cache of the last captions, such as the prompts' half of those for guidance."""
        if batch not in self._last:
            y, mask, null = (None if x is None else x[-batch:] for x in (self.y_BLC, self.mask_BL, self.null_B))
            self._last[batch] = TextCache(y, mask, null, [block.last(batch) for block in self.blocks])
        return self._last[batch]

    def chunk(self, chunks: int, dim: int = 0) -> tuple["TextCache", "TextCache"]:
        """Return this batch and its prompts' half, as FasterCache of diffusers takes the second of two halves."""
        assert (chunks, dim) == (2, 0)
        keys_values = self.blocks[0].keys_values  # of the steps before, which had both halves
        assert keys_values is not None
        return self, self.last(len(keys_values[0]) // 2)


class CrossAttention(nn.Module, AttentionModuleMixin):
    """Attention to the caption: [B, T, S, D] -> [B, T, S, D]; what a `BlockText` has not yet is computed and kept."""

    is_cross_attention = True  # for diffusers' caches
    _supports_qkv_fusion = False

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.processor = AttentionKernel()
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the caption's keys and values, each [B, N, L, K]."""
        k, v = split_heads(self.kv_linear(text_BLD), 2, self.num_heads)
        return k, v

    def _kept(self, text: BlockText) -> tuple[Tensor, Tensor]:
        if text.keys_values is None:
            assert text.states_BLD is not None
            text.keys_values, text.states_BLD = self.keys_values(text.states_BLD), None
        return text.keys_values

    def forward(self, x_BTSD: Tensor, text: Tensor | BlockText, mask_BL: Tensor | None) -> Tensor:
        k, v = self.keys_values(text) if isinstance(text, Tensor) else self._kept(text)
        frames = x_BTSD.shape[1]
        q = rearrange(self.q_linear(x_BTSD), "b t s (n k) -> b n (t s) k", n=self.num_heads)
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        x_BNLK = self.processor(q, k, v, mask)
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
