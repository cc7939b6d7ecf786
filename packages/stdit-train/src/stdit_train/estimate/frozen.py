"""Working memory of the frozen VAE and text encoder, by formula from their configurations: besides their weights.

For attention in fused kernels, which keep no scores, and without the workspace that a convolution's kernel may want.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stdit_data.buckets import Bucket

CHUNK = 16  # frames that an image VAE encodes and decodes at once
ITEMSIZE = 4  # bytes of the VAE's weights and activations


def encoding_bytes(vae: Mapping[str, Any], clips: int, shape: Bucket) -> int:
    """Return the most bytes that encoding clips takes: pixels as uint8 and float32, and the widest ResNet block.

    Args:
        vae: arguments of AutoencoderKL.
        clips: encoded together.
        shape: of each, in frames and pixels.
    """
    # Beside its input, output and sum a block keeps its quotient, and the encoder the input of the first of several.
    maps = 5 if vae.get("layers_per_block", 1) > 1 else 4
    widths = vae["block_out_channels"]
    widest = max(_attention(widths), *(maps * width // 4**level for level, width in enumerate(widths)))
    area = shape.height * shape.width
    return ITEMSIZE * widest * area * _frames(vae, clips, shape) + (1 + 4) * 3 * clips * shape.frames * area


def decoding_bytes(vae: Mapping[str, Any], clips: int, shape: Bucket) -> int:
    """Return the most bytes that decoding clips takes: the widest ResNet block, and all pixels as float32.

    Args: as of `encoding_bytes`.
    """
    widths = vae["block_out_channels"]
    # Its input, as wide as the level below, is normalised first; then as in `encoding_bytes`.
    levels = enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True))
    maps = (max(3 * below, below + 4 * width) // 4**level for level, (width, below) in levels)
    widest = max(_attention(widths), *maps)
    area = shape.height * shape.width
    return ITEMSIZE * (widest * area * _frames(vae, clips, shape) + 3 * clips * shape.frames * area)


def text_bytes(text: Mapping[str, Any], captions: int, length: int, itemsize: int = 2) -> int:
    """Return the most bytes that encoding captions takes: the feed-forward layer with its gate, or attention.

    Args:
        text: arguments of T5Config.
        captions: encoded together.
        length: tokens of each.
        itemsize: bytes of an activation.
    """
    heads, inner = text["num_heads"], text["num_heads"] * text["d_kv"]
    layers = 5 * text["d_ff"] + 2 * text["d_model"], 3 * heads * length + 6 * inner + 2 * text["d_model"]
    return itemsize * (captions * length * max(layers) + heads * length**2)


def _frames(vae: Mapping[str, Any], clips: int, shape: Bucket) -> int:
    """Return the frames that are encoded or decoded at once; a video VAE takes whole clips."""
    frames = clips * shape.frames
    return frames if "temporal_compression_ratio" in vae else min(CHUNK, frames)


def _attention(widths: Sequence[int]) -> int:
    """Return the values per pixel in the middle block's attention: its input and output, queries, keys and values."""
    return 8 * widths[-1] // 4 ** (len(widths) - 1)
