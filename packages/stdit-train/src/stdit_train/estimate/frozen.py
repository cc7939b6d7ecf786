"""Working memory of the frozen VAE and text encoder, from their configurations: besides their weights.

By formula for AutoencoderKL and T5; any other VAE is run on fake tensors, which have no memory. For attention in fused
kernels, which keep no scores, and without the workspace that a convolution's kernel may want.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stdit_data.buckets import Bucket
from stdit_model.causal_vae.video_autoencoder import vae_class
from stdit_model.video_vae import decode, encode_moments, latent_shape
from stdit_train.components.sizes import CLASS
from stdit_train.estimate.sampling import peak

CHUNK = 16  # frames that an image VAE encodes and decodes at once
ITEMSIZE = 4  # bytes of the VAE's weights and activations


def encoding_bytes(vae: Mapping[str, Any], clips: int, shape: Bucket) -> int:
    """Return the most bytes that encoding clips takes: pixels as uint8 and float32, and the widest ResNet block.

    Args:
        vae: its configuration (see `components.sizes`).
        clips: encoded together.
        shape: of each, in frames and pixels.
    """
    area = shape.height * shape.width
    pixels = (1 + 4) * 3 * clips * shape.frames * area
    if _is_measured(vae):
        return clips * _measure(json.dumps(dict(vae)), shape)[0] + pixels
    # Beside its input, output and sum a block keeps its quotient, and the encoder the input of the first of several.
    maps = 5 if vae.get("layers_per_block", 1) > 1 else 4
    widths = vae["block_out_channels"]
    widest = max(_attention(widths), *(maps * width // 4**level for level, width in enumerate(widths)))
    return ITEMSIZE * widest * area * _frames(vae, clips, shape) + pixels


def decoding_bytes(vae: Mapping[str, Any], clips: int, shape: Bucket) -> int:
    """Return the most bytes that decoding clips takes: the widest ResNet block, and all pixels as float32.

    Args: as of `encoding_bytes`.
    """
    if _is_measured(vae):
        return clips * _measure(json.dumps(dict(vae)), shape)[1]
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


def _is_measured(vae: Mapping[str, Any]) -> bool:
    return vae.get(CLASS, "AutoencoderKL") != "AutoencoderKL"


@cache
def _measure(vae: str, shape: Bucket) -> tuple[int, int]:
    """Return the bytes that encoding and decoding a clip takes, besides its pixels when it is encoded."""
    values = json.loads(vae)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = vae_class(values[CLASS]).from_config(values)
        video, latents = torch.empty(1, 3, *shape), torch.empty(1, *latent_shape(model, *shape))
        return peak(lambda: encode_moments(model, video)), peak(lambda: decode(model, latents, frames=shape.frames))


def _frames(vae: Mapping[str, Any], clips: int, shape: Bucket) -> int:
    """Return the frames that are encoded or decoded at once; a video VAE takes whole clips."""
    frames = clips * shape.frames
    return frames if "temporal_compression_ratio" in vae else min(CHUNK, frames)


def _attention(widths: Sequence[int]) -> int:
    """Return the values per pixel in the middle block's attention: its input and output, queries, keys and values."""
    return 8 * widths[-1] // 4 ** (len(widths) - 1)
