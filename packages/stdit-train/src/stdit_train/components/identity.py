"""A short hash that tells models apart by their weights, whatever file, precision or quantisation they came in.

It is taken of evenly spaced values of every tensor, in bfloat16: milliseconds for a model of any size. Training changes
nearly all values, so another model has another hash; a single weight changed by hand may go unnoticed.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stdit_data.latents.dataset import LatentDataset
from stdit_train.components.load import Components
from stdit_train.config.load import ConfigError

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


SAID = {"vae": ("VAE", "--vae"), "text_encoder": ("text encoder", "--text-encoder")}


def check_components(dataset: LatentDataset, components: Components) -> None:
    """Looks whether the run's VAE, its scale and, where it has one, its text encoder are those of the cache.

    Raises:
        ConfigError: another one; the message names both.
    """
    _compare(dataset, "vae", dataset.about, about_vae(components.vae, components.vae_source))
    if components.text_encoder is not None:
        check_text_encoder(dataset, components.text_encoder, components.text_source)


def check_text_encoder(dataset: LatentDataset, encoder: Any, source: str) -> None:
    """Looks whether a text encoder is that of the cache, where it has texts.

    Raises:
        ConfigError: another one.
    """
    if dataset.about_text is not None:
        _compare(dataset, "text_encoder", dataset.about_text, about_text_encoder(encoder, source))


def _compare(dataset: LatentDataset, key: str, about: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    there, (what, option) = about[key], SAID[key]
    for fact in ("class", "hash", "scale"):
        if fact in there and there[fact] != asked[fact]:
            raise ConfigError(
                f"{dataset.url} was encoded with the {what} {there['source']} ({fact} {there[fact]}), this run has "
                f"{asked['source']} ({fact} {asked[fact]}): leave {option} out, or encode anew"
            )


SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def about_vae(vae: Any, name: str) -> dict[str, Any]:
    """What a cache records of a VAE: class, weights, and the numbers that normalise its latents."""
    scale = {key: vae.config.get(key) for key in SCALE if vae.config.get(key) is not None}
    return {"source": name, "class": type(vae).__name__, "hash": vae_hash(vae), "scale": scale}


def about_text_encoder(encoder: Any, name: str) -> dict[str, Any]:
    """What a cache records of a text encoder: class, weights, width."""
    return {
        "source": name,
        "class": type(encoder).__name__,
        "hash": text_encoder_hash(encoder),
        "width": encoder.config.d_model,
    }
