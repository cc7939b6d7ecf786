"""The transformer block: one shell (modulation, cross-attention, MLP) around four ways to mix tokens.

Legend: B batch, T frames, S tokens per frame, L text tokens, D width, N heads, K head width.

A variant is the list of its blocks' mixings:

    dit       full, full, ...               one attention over all T*S tokens
    seq       sequential, sequential, ...   spatial, then temporal attention (STDiT, the one Open-Sora 1.0 trained)
    parallel  parallel, parallel, ...       both attentions read the same input and are added
    latte     spatial, temporal, ...        whole blocks of the two kinds alternate (Latte, variant 1)
"""

from typing import Literal

import torch
from torch import Tensor, nn

from stdit_model.errors import SettingsError
from stdit_model.layers import (
    BlockText,
    CrossAttention,
    FullAttention,
    LayerNorm,
    Mlp,
    SelfAttention,
    SpatialAttention,
    TemporalAttention,
    add_gated,
    modulate,
)
from stdit_model.presets import VARIANTS, Variant

Mixing = Literal["full", "sequential", "parallel", "spatial", "temporal"]


def mixings(variant: Variant, depth: int) -> list[Mixing]:
    """Return how each of the `depth` blocks of a variant mixes tokens.

    Raises:
        SettingsError: unknown variant.
    """
    kinds: dict[Variant, tuple[Mixing, ...]] = {
        "dit": ("full",),
        "seq": ("sequential",),
        "parallel": ("parallel",),
        "latte": ("spatial", "temporal"),
    }
    if variant not in kinds:
        raise SettingsError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    turns = kinds[variant]
    return [turns[i % len(turns)] for i in range(depth)]


class Block(nn.Module):
    """x [B, T, S, D] -> [B, T, S, D], conditioned on the timestep (adaLN-single, PixArt-alpha) and the caption."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, mixing: Mixing) -> None:
        super().__init__()
        self.mixing = mixing
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        if mixing == "full":
            self.attn: SelfAttention = FullAttention(width, num_heads)
        elif mixing != "temporal":
            self.attn = SpatialAttention(width, num_heads)
        if mixing in ("sequential", "parallel", "temporal"):
            self.attn_temp = TemporalAttention(width, num_heads)
        self.cross_attn = CrossAttention(width, num_heads)
        self.mlp = Mlp(width, int(width * mlp_ratio), width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        hidden_states: Tensor,
        t0_B6D: Tensor,
        text: Tensor | BlockText,
        mask_BL: Tensor | None,
        position_TD: Tensor | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            hidden_states: tokens [B, T, S, D], under the name that diffusers' caches look for.
            t0_B6D: the shared modulation vectors of the timestep, float32.
            text: the caption's states [B, L, D], or what is kept of it from step to step.
            mask_BL: True for text tokens that are attended to; None for all.
            position_TD: positions that temporal attention adds (in block 0 of seq and parallel).
        """
        x = hidden_states
        vectors = (self.scale_shift_table.float() + t0_B6D).to(x.dtype)  # summed in float32: timesteps differ by little
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors[:, :, None, None].unbind(1)

        h = modulate(self.norm1(x), shift_msa, scale_msa)
        if self.mixing == "sequential":
            x = add_gated(x, gate_msa, self.attn(h))
            x = add_gated(x, gate_msa, self.attn_temp(x, position_TD))  # neither normalised nor modulated
        elif self.mixing == "parallel":
            x = add_gated(x, gate_msa, self.attn(h) + self.attn_temp(h, position_TD))
        elif self.mixing == "temporal":
            x = add_gated(x, gate_msa, self.attn_temp(h))
        else:
            x = add_gated(x, gate_msa, self.attn(h))
        x = x + self.cross_attn(x, text, mask_BL)
        return add_gated(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))
