"""Sequence parallelism: make the processes of a group share each clip, by changing a single-device STDiT from outside.

Each process holds some of the frames. Spatial attention, cross-attention and MLP work within a frame. Before temporal
attention an all-to-all gives every process all frames of some positions, and another one returns them (dynamic sequence
parallelism, arXiv:2403.10266): two exchanges of the activations per block. Full attention ("dit") is divided by heads
(Ulysses, arXiv:2309.14509): queries, keys and values are exchanged and then the output, four times as much.

Every process passes the whole latents and gets the whole prediction, so losses and samplers need no change. The loss is
the same on each process, and the gradients of a process are the part of its own tokens: their mean over all processes,
which FSDP2 computes, equals the gradients of one process.

Frames and positions that the group does not divide are padded, and the padding is removed before attention.

Legend: B batch, T frames, t a process's own frames, S tokens per frame, s a process's positions, D width, N heads,
n a process's heads, K head width, p the processes of the group.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from stdit_model import STDiT
from stdit_model.layers import SelfAttention, attention
from stdit_train.errors import ConfigError


class _Clip:
    """The clip being computed: its number of `frames` T, and the `size` processes that share it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.frames = 0

    def exchange(self, x: Tensor) -> Tensor:
        """Send part i of the first axis (p parts) to process i; part i of the result is from process i."""
        return collectives.all_to_all_single_autograd(x.contiguous(), None, None, self.group)


def share_clips(model: STDiT, group: dist.ProcessGroup) -> None:
    """Divide every clip that a model computes among the processes of a group.

    Args:
        model: changed in place.
        group: processes that call the model with the same inputs.

    Raises:
        ConfigError: the group does not divide the heads of full attention.
    """
    clip = _Clip(group)
    if model.config.variant == "dit" and model.config.num_heads % clip.size:
        raise ConfigError(f"full attention is shared by heads: {clip.size} does not divide {model.config.num_heads}")
    for block in model.blocks:
        if block.mixing == "full":
            block.attn.forward = partial(_by_heads, block.attn, clip)  # type: ignore[method-assign]
        elif hasattr(block, "attn_temp"):
            forward = partial(_by_positions, block.attn_temp.forward, clip)
            block.attn_temp.forward = forward  # type: ignore[method-assign]
    model.forward = partial(_own_frames, model.forward, clip, model.config.patch_size[0])  # type: ignore[method-assign]


def _own_frames(
    forward: Callable[..., Tensor], clip: _Clip, patch: int, x: Tensor, *args: Any, first_frame: int = 0, **options: Any
) -> Tensor:
    """Run STDiT.forward on this process's frames of x [B, C, T, H, W] and return the prediction of all frames."""
    if x.ndim != 5 or x.shape[2] % patch:
        return forward(x, *args, first_frame=first_frame, **options)  # it reports the shape
    frames = x.shape[2]
    clip.frames = frames // patch
    own = patch * -(-clip.frames // clip.size)
    start = clip.rank * own
    mine = F.pad(x, (0, 0, 0, 0, 0, own * clip.size - frames)).narrow(2, start, own)
    output = forward(mine, *args, first_frame=first_frame + start, **options)
    parts = clip.exchange(output.expand(clip.size, *output.shape))  # backward: the sum of all processes' gradients
    return rearrange(parts, "p b c t h w -> b c (p t) h w")[:, :, :frames].clone()


def _by_positions(
    forward: Callable[[Tensor], Tensor], clip: _Clip, x_BtSD: Tensor, position_tD: Tensor | None = None
) -> Tensor:
    """Run temporal attention: own frames of all positions -> all frames of own positions -> and back."""
    if position_tD is not None:
        x_BtSD = x_BtSD + position_tD[:, None].to(x_BtSD.dtype)
    tokens = x_BtSD.shape[2]
    x = _pad(x_BtSD, 2, -(-tokens // clip.size) * clip.size)
    x = clip.exchange(rearrange(x, "b t (p s) d -> p b t s d", p=clip.size))
    x_BTsD = rearrange(x, "p b t s d -> b (p t) s d")
    padded = x_BTsD.shape[1]
    x_BTsD = _pad(forward(x_BTsD[:, : clip.frames]), 1, padded)
    x = clip.exchange(rearrange(x_BTsD, "b (p t) s d -> p b t s d", p=clip.size))
    return rearrange(x, "p b t s d -> b t (p s) d")[:, :, :tokens]


def _by_heads(layer: SelfAttention, clip: _Clip, x_BtSD: Tensor) -> Tensor:
    """Run full attention: all heads of own tokens -> own heads of all tokens -> and back."""
    frames = x_BtSD.shape[1]
    qkv = rearrange(
        layer.qkv(x_BtSD), "b t s (three p n k) -> p b (t s) (three n k)",
        three=3, p=clip.size, n=layer.num_heads // clip.size,
    )  # fmt: skip
    qkv = rearrange(
        clip.exchange(qkv), "p b l (three n k) -> three b n (p l) k", three=3, n=layer.num_heads // clip.size
    )
    padded, tokens = qkv.shape[3], clip.frames * x_BtSD.shape[2]
    q, k, v = qkv[:, :, :, :tokens]
    x_BnLK = _pad(attention(q, k, v), 2, padded)
    x = clip.exchange(rearrange(x_BnLK, "b n (p l) k -> p b l (n k)", p=clip.size))
    output: Tensor = layer.proj(rearrange(x, "p b (t s) d -> b t s (p d)", t=frames))
    return output


def _pad(x: Tensor, axis: int, size: int) -> Tensor:
    """Append zeros to an axis, up to a size."""
    missing = size - x.shape[axis]
    return F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [0, missing]) if missing else x
