"""Parameters, FLOPs and activation memory of a forward and a training step, by formula.

A multiply-add is two FLOPs; matrix products and the patch convolution are counted, elementwise work is not. The
counts are those of attention as two plain matrix products (torch's FlopCounterMode under the MATH backend).

Legend: B batch, C channels, T frames, S tokens per frame, n = B*T*S tokens in all, L text tokens, D width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stdit_model.blocks import Mixing, mixings
from stdit_model.embed import FREQUENCY_CHANNELS
from stdit_model.model import STDiT


class Parameters(NamedTuple):
    """Numbers of parameters, without buffers (the null caption)."""

    total: int
    temporal: int  # of attention across frames, which an image model does not have


class _Sizes(NamedTuple):
    batch: int
    frames: int
    tokens: int  # per frame
    text: int
    width: int
    hidden: int  # of the MLP
    patch: int  # latent values in a patch
    out: int  # values predicted for a patch
    caption: int
    mixings: list[Mixing]

    @property
    def n(self) -> int:
        return self.batch * self.frames * self.tokens


def parameters(config: Mapping[str, Any]) -> Parameters:
    """Count the parameters of an STDiT, given its constructor arguments (a preset, or `model.config`)."""
    counts = {name: math.prod(shape) for name, shape in STDiT.parameter_shapes(**STDiT.arguments(config)).items()}
    del counts["y_embedder.y_embedding"]
    temporal = sum(count for name, count in counts.items() if ".attn_temp." in name)
    return Parameters(sum(counts.values()), temporal)


def forward_flops(config: Mapping[str, Any], shape: Sequence[int], text_tokens: int | None = None) -> int:
    """Count the FLOPs of one forward.

    Args:
        config: STDiT's constructor arguments, or `model.config`.
        shape: of the latents, [B, C, T, H, W].
        text_tokens: L; the configuration's model_max_length by default.
    """
    sizes = _sizes(config, shape, text_tokens)
    return sum(_ends(sizes)) + sum(_text(sizes)) + sum(_block(sizes, mixing) for mixing in sizes.mixings)


def train_flops(
    config: Mapping[str, Any], shape: Sequence[int], text_tokens: int | None = None, checkpointing: bool = False
) -> int:
    """Count the FLOPs of a forward and a backward (arguments as `forward_flops`).

    The backward of a product costs twice its forward, or once for the three products whose input needs no gradient.

    Args:
        checkpointing: each block's forward is repeated in the backward.
    """
    sizes = _sizes(config, shape, text_tokens)
    blocks = sum(_block(sizes, mixing) for mixing in sizes.mixings)
    outer = [_ends(sizes), _text(sizes)]
    return 3 * blocks + sum(2 * first + 3 * rest for first, rest in outer) + (blocks if checkpointing else 0)


def partial_train_flops(
    config: Mapping[str, Any], shape: Sequence[int], trained: int, *, added: bool, checkpointing: bool = False
) -> int:
    """Count the FLOPs of a forward and a backward in which a part of the weights is trained.

    The backward computes the gradients of all tokens, and of what is trained.

    Args:
        config, shape, checkpointing: as of `train_flops`.
        trained: number of parameters that are trained, each of which is counted as if all tokens came to it.
        added: whether they are an adapter beside the model's own weights, and have a forward of their own.
    """
    sizes = _sizes(config, shape, None)
    blocks = sum(_block(sizes, mixing) for mixing in sizes.mixings)
    (first, rest), text = _ends(sizes), sum(_text(sizes))
    own = 2 * sizes.n * trained * (3 if added else 1)
    return (3 if checkpointing else 2) * blocks + first + 2 * rest + text + own


def activation_bytes(
    config: Mapping[str, Any],
    shape: Sequence[int],
    text_tokens: int | None = None,
    itemsize: int = 2,
    checkpointing: bool = False,
) -> int:
    """Count the bytes of activations that a forward keeps for its backward (arguments as `forward_flops`).

    For fused attention kernels, which keep queries, keys, values, the output and one log-sum a row. Parameters,
    gradients, temporary buffers and the copies of weights made by autocast are not included.

    Args:
        itemsize: bytes of an activation: 2 for bfloat16, 4 for float32.
        checkpointing: only each block's input is kept, and in the backward the activations of one block at a time.
    """
    sizes = _sizes(config, shape, text_tokens)
    n, width, text = sizes.n, sizes.width, sizes.batch * sizes.text
    heads = STDiT.arguments(config)["num_heads"]
    ends = (n * sizes.patch + text * (sizes.caption + 3 * width) + 3 * n * width) * itemsize + 8 * n
    keys_values = 2 * text * width * itemsize
    blocks = [keys_values + _kept(sizes, mixing, itemsize, heads) for mixing in sizes.mixings]
    if checkpointing:
        return ends + len(blocks) * n * width * itemsize + max(blocks)
    return ends + sum(blocks)


def forward_bytes(
    config: Mapping[str, Any], shape: Sequence[int], text_tokens: int | None = None, itemsize: int = 2
) -> int:
    """Count the most bytes that a forward without gradients holds at once (arguments as `activation_bytes`).

    The keys and values of the text are included, parameters are not.
    """
    sizes = _sizes(config, shape, text_tokens)
    keys_values = len(sizes.mixings) * 2 * sizes.batch * sizes.text * sizes.width
    # in the MLP, with its two hidden tensors: tokens of the caller and the block, the input and what it is made from;
    # in attention: these two, the input, q, k and v, and the output in both layouts
    tokens = sizes.n * max(4 * sizes.width + 2 * sizes.hidden, 8 * sizes.width)
    return (keys_values + tokens) * itemsize


def _ends(sizes: _Sizes) -> tuple[int, int]:
    """FLOPs outside blocks and text: of products whose input needs no gradient, and of the others."""
    width, batch = sizes.width, sizes.batch
    first = 2 * sizes.n * sizes.patch * width + 2 * batch * FREQUENCY_CHANNELS * width
    rest = 2 * batch * 7 * width**2 + 2 * sizes.n * width * sizes.out
    return first, rest


def _text(sizes: _Sizes) -> tuple[int, int]:
    """FLOPs of the caption's MLP, in the same two parts."""
    text, width = sizes.batch * sizes.text, sizes.width
    return 2 * text * sizes.caption * width, 2 * text * width**2


def _block(sizes: _Sizes, mixing: Mixing) -> int:
    """FLOPs of one block, the caption's keys and values included."""
    n, width = sizes.n, sizes.width
    reach = {"spatial": sizes.tokens, "temporal": sizes.frames, "full": sizes.tokens * sizes.frames}
    attentions = ("spatial", "temporal") if mixing in ("sequential", "parallel") else (mixing,)
    self_attention = sum(2 * n * 4 * width**2 + 4 * n * reach[kind] * width for kind in attentions)
    keys_values = 2 * sizes.batch * sizes.text * 2 * width**2
    cross_attention = keys_values + 2 * n * 2 * width**2 + 4 * n * sizes.text * width
    return self_attention + cross_attention + 2 * n * 2 * width * sizes.hidden


def _kept(sizes: _Sizes, mixing: Mixing, itemsize: int, heads: int) -> int:
    """Bytes that one block keeps for its backward."""
    attention = 6  # its input, q, k and v, their output, and the projection's output, which the gate multiplies
    tensors = {
        "sequential": 2 * attention,
        "parallel": 2 * attention - 1,  # the gate multiplies the sum
    }.get(mixing, attention)
    cross_attention = 3  # its input, q, and the output
    norms = 2 * 2  # what goes in, and what comes out before the modulation
    mlp = 2  # the modulated input and the gated output; its two hidden tensors are the last term below
    log_sums = 3 if mixing in ("sequential", "parallel") else 2
    elements = (tensors + cross_attention + norms + mlp) * sizes.width + 2 * sizes.hidden
    return sizes.n * (elements * itemsize + 4 * (log_sums * heads + 2 * 2))  # two norms' means and deviations


def _sizes(config: Mapping[str, Any], shape: Sequence[int], text_tokens: int | None) -> _Sizes:
    arguments = STDiT.arguments(config)
    batch, channels, *extent = shape
    grid = [size // patch for size, patch in zip(extent, arguments["patch_size"], strict=True)]
    volume = math.prod(arguments["patch_size"])
    return _Sizes(
        batch=batch,
        frames=grid[0],
        tokens=grid[1] * grid[2],
        text=arguments["model_max_length"] if text_tokens is None else text_tokens,
        width=arguments["hidden_size"],
        hidden=int(arguments["hidden_size"] * arguments["mlp_ratio"]),
        patch=channels * volume,
        out=volume * channels * (2 if arguments["learn_sigma"] else 1),
        caption=arguments["caption_channels"],
        mixings=mixings(arguments["variant"], arguments["depth"]),
    )
