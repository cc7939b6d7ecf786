"""A short hash that tells models apart by their weights, whatever file, precision or quantisation they came in.

It is taken of evenly spaced values of every tensor, in bfloat16: milliseconds for a model of any size. Training changes
nearly all values, so another model has another hash; a single weight changed by hand may go unnoticed.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

VALUES = 1024  # of each tensor, at most twice as many


def vae_hash(vae: Any) -> str:
    """Of all weights."""
    return _digest(tensor for tensor in vae.state_dict().values() if tensor.is_floating_point())


def text_encoder_hash(text_encoder: Any) -> str:
    """Of norms and embeddings, which 8-bit loading and offloading leave as they are."""
    return _digest(_plain_tensors(text_encoder))


def _plain_tensors(model: Any) -> Iterator[Tensor]:
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not isinstance(module, torch.nn.Embedding) and any(parameter.ndim != 1 for parameter in own):
            continue
        if any(parameter.is_meta for parameter in own):  # offloaded: the hook that brings it in for a forward
            from accelerate.utils import align_module_device

            with align_module_device(module, "cpu"):
                yield from [parameter.detach().clone() for parameter in module.parameters(recurse=False)]
        else:
            yield from own


def _digest(tensors: Iterable[Tensor]) -> str:
    """Names and order don't count: libraries rename weights, and tied ones appear once or twice."""
    parts = set()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // VALUES)].to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
        parts.add(hashlib.sha256(repr(tuple(tensor.shape)).encode() + values.numpy().tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()[:16]
