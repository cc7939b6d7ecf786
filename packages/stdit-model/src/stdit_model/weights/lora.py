"""LoRA adapters (arXiv:2106.09685) as files: diffusers' format, checked against the model they are loaded into.

A file pytorch_lora_weights.safetensors has the tensors transformer.MODULE.lora_A.weight [r, in] and
transformer.MODULE.lora_B.weight [out, r] of each adapted linear layer, whose output gains alpha / r * B A x. Rank and
alpha are in its metadata, as peft's configuration; without them alpha is the rank.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from stdit_model.errors import SettingsError, WeightsError, few, reason

METADATA = "lora_adapter_metadata"  # key of its metadata, where diffusers has peft's configuration as JSON
PREFIX = "transformer."
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
_BLOCK = re.compile(r"^blocks\.\d+\.")
# What is read of a file's metadata. peft's configuration has more, of which some names modules to import.
SETTINGS: dict[str, Any] = {
    "r": int,
    "lora_alpha": int | float,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "use_rslora": bool,
}


def read_lora(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read an adapter's tensors, and the configuration in its metadata, None if it has none.

    Raises:
        WeightsError: it is not a safetensors file, or its metadata is damaged.
    """
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(METADATA)
        metadata = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{file}: not a readable adapter in safetensors format ({reason(error)})") from error
    return tensors, metadata if isinstance(metadata, dict) else None


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the shapes (out, in) of a model's linear layers by name, of adapted ones those of the layer below."""
    layers = {name.removesuffix(".base_layer"): part for name, part in model.named_modules()}
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) and ".lora_" not in name
    }


def check_lora(tensors: Mapping[str, Tensor], model: nn.Module, source: str | Path) -> None:
    """Check that an adapter is of a model.

    Args:
        tensors: of the file, by its own names.
        model: that it is for.
        source: for messages.

    Raises:
        WeightsError: names or shapes differ, values are not finite, or it is in another format.
    """
    strange = [name for name in tensors if _KEY.fullmatch(name) is None]
    if strange or not tensors:
        raise WeightsError(
            f"{source}: not a LoRA of a transformer in diffusers' format, whose keys are such as "
            f"{PREFIX}blocks.0.attn.qkv.lora_A.weight: it has {few(strange) or 'no tensors'}"
        )
    shapes = linear_shapes(model)
    parts = {(match[1], match[2]): tensor for name, tensor in tensors.items() if (match := _KEY.fullmatch(name))}
    modules = list(dict.fromkeys(name for name, _ in parts))
    unknown = [name for name in modules if name not in shapes]
    if unknown:
        raise WeightsError(
            f"{source}: an adapter of another model: this one has no linear layer {few(unknown)}"
            f"{_nearest(unknown[0], shapes)}"
        )
    for name in modules:
        a, b = parts.get((name, "A")), parts.get((name, "B"))
        if a is None or b is None:
            raise WeightsError(f"{source}: damaged: it has one of lora_A and lora_B of {name}, not both")
        theirs = (b.shape[0], a.shape[1]) if a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] else None
        if theirs != shapes[name]:
            found = f"[{b.shape[0]}, {a.shape[1]}]" if theirs else f"{list(b.shape)} times {list(a.shape)}"
            raise WeightsError(
                f"{source}: an adapter of a model of another size: {name} is {found} there, "
                f"{list(shapes[name])} in this model"
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise WeightsError(f"{source}: {name} has values that are not finite: the training had diverged")


def peft_settings(
    metadata: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], source: str | Path
) -> dict[str, Any] | None:
    """Return the settings of peft that a file's metadata has, by its keys; None if it has none.

    Args:
        metadata: of the file.
        tensors: of the file, which `check_lora` has checked.
        source: for messages.

    Raises:
        WeightsError: one of another type than expected, or a rank that is not that of the tensors.
    """
    found = {key: metadata[PREFIX + key] for key in SETTINGS if PREFIX + key in metadata} if metadata else {}
    if not found:
        return None
    for key, value in found.items():
        if not isinstance(value, SETTINGS[key]) or isinstance(value, bool) != (SETTINGS[key] is bool):
            raise WeightsError(f"{source}: its metadata has {key} {value!r}, which makes no sense")
    ranks = sorted({len(tensor) for name, tensor in tensors.items() if ".lora_A." in name})
    if not found.get("rank_pattern") and ranks != [found.get("r")]:
        raise WeightsError(f"{source}: damaged: its metadata has rank {found.get('r')}, its tensors {ranks}")
    found["target_modules"] = [match[1] for name in tensors if (match := _KEY.fullmatch(name)) and match[2] == "A"]
    return {PREFIX + key: value for key, value in found.items()}


def choose_modules(names: Iterable[str], model: nn.Module) -> list[str]:
    """Return the ends of the names of the linear layers that a user means, as peft matches them.

    Args:
        names: parts of a block, as "attn" or "attn.qkv", or of the model, as "final_layer".
        model: whose layers are meant.

    Raises:
        SettingsError: the model has no such part; the message names the nearest.
    """
    layers = dict.fromkeys(_BLOCK.sub("", layer) for layer in linear_shapes(model))
    chosen = []
    for name in names:
        ends = [layer for layer in layers if f"{layer}.".startswith(f"{name}.")]
        if not ends:
            known = {layer.split(".")[0]: None for layer in layers} | layers
            raise SettingsError(f"no linear layer is in {name!r} of this model{_nearest(name, known)}")
        chosen += ends
    return list(dict.fromkeys(chosen))


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f" (the nearest is {near[0]})" if near else ""
