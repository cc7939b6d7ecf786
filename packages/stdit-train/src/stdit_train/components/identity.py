"""Hash the VAE and the text encoder, and check that a run uses those that its cache was made with.

A hash covers evenly spaced values of every tensor, in bfloat16. That takes milliseconds for a model of any size and
gives the same result for any file format, precision or quantisation. Training changes nearly all values, so another
model has another hash; a single weight changed by hand may go unnoticed.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stdit_data.latents.dataset import LatentDataset
from stdit_train.errors import ConfigError

VALUES_PER_TENSOR = 1024  # hashed; at most twice as many
SCALE_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "levels")  # no weights, but in latents
_NAMES = {"vae": ("VAE", "--vae"), "text_encoder": ("text encoder", "--text-encoder")}


def vae_hash(vae: Any) -> str:
    """Hash all weights of a VAE; 16 hexadecimal digits."""
    return _digest(tensor for tensor in vae.state_dict().values() if tensor.is_floating_point())


def text_encoder_hash(text_encoder: Any) -> str:
    """Hash a text encoder's norms and embeddings, which 8-bit loading and offloading leave unchanged; 16 hexadecimal
    digits."""
    return _digest(_unquantised_tensors(text_encoder))


def about_vae(vae: Any, name: str) -> dict[str, Any]:
    """Return what a cache records of a VAE: class, hash, and the numbers that scale or round its latents."""
    found = {key: vae.config.get(key) for key in SCALE_KEYS}
    scale = {
        key: list(value) if isinstance(value, tuple) else value for key, value in found.items() if value is not None
    }
    return {"source": name, "class": type(vae).__name__, "hash": vae_hash(vae), "scale": scale}


def about_text_encoder(encoder: Any, name: str) -> dict[str, Any]:
    """Return what a cache records of a text encoder: class, hash and width."""
    return {
        "source": name,
        "class": type(encoder).__name__,
        "hash": text_encoder_hash(encoder),
        "width": encoder.config.d_model,
    }


def check_vae(dataset: LatentDataset, vae: Any, source: str) -> None:
    """Check that a VAE and the scale of its latents are those of a cache.

    Raises:
        ConfigError: they differ; the message names both.
    """
    _check_same(dataset, "vae", dataset.metadata, about_vae(vae, source))


def check_text_encoder(dataset: LatentDataset, encoder: Any, source: str) -> None:
    """Check that a text encoder is that of a cache; a cache without texts fits any.

    Raises:
        ConfigError: they differ; the message names both.
    """
    if dataset.text_metadata is not None:
        _check_same(dataset, "text_encoder", dataset.text_metadata, about_text_encoder(encoder, source))


def _unquantised_tensors(model: Any) -> Iterator[Tensor]:
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not isinstance(module, torch.nn.Embedding) and any(parameter.ndim != 1 for parameter in own):
            continue
        if any(parameter.is_meta for parameter in own):  # offloaded: accelerate's hook fetches the weights
            from accelerate.utils import align_module_device

            with align_module_device(module, "cpu"):
                yield from [parameter.detach().clone() for parameter in module.parameters(recurse=False)]
        else:
            yield from own


def _digest(tensors: Iterable[Tensor]) -> str:
    """Hash tensors whatever their names and order: libraries rename weights, and list tied ones once or twice."""
    parts = set()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // VALUES_PER_TENSOR)
        values = flat[::step].to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
        parts.add(hashlib.sha256(repr(tuple(tensor.shape)).encode() + values.numpy().tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()[:16]


def _check_same(dataset: LatentDataset, part: str, recorded: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    theirs, (what, option) = recorded[part], _NAMES[part]
    for key in ("class", "hash", "scale"):
        if key in theirs and theirs[key] != ours[key]:
            raise ConfigError(
                f"{dataset.url} was encoded with the {what} {theirs['source']} ({key} {theirs[key]}), this run has "
                f"{ours['source']} ({key} {ours[key]}): leave {option} out, or encode again"
            )
