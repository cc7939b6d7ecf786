"""Weights in, strictly: what of a file goes where, with nothing left over and nothing left out.

`open_sora_weights` and `pixart_weights` turn a file into a `Weights`: constructor arguments, lazy tensors by STDiT's
names, and the names that are new or unused and known to be. `build` makes a model of it; a sharded load takes the
same `tensors` one at a time, so that the whole file is never in memory.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import is_accelerate_available
from torch import Tensor, nn

from stdit_model.errors import WeightsError
from stdit_model.weights.files import Checkpoint, LazyTensor, open_checkpoint, read_json
from stdit_model.weights.hub import local_path
from stdit_model.weights.layouts import (
    LAYOUT_NAMES,
    MICRO_CONDITIONS,
    Layout,
    expected_unused,
    position_scales,
    recognised,
    sizes,
    stdit_items,
)
from stdit_model.weights.strict import KeyMatch, fit

if TYPE_CHECKING:
    from stdit_model.model import STDiT

__all__ = ["Weights", "WeightsError", "build", "open_sora_weights", "pixart_weights"]

NULL_CAPTION = "y_embedder.y_embedding"
PUBLISHED_HEAD_WIDTH = 72  # of every published STDiT and PixArt


@dataclass(frozen=True)
class Weights:
    """A checkpoint as STDiT reads it.

    Attributes:
        path: the file.
        config: STDiT's constructor arguments.
        tensors: by STDiT's parameter names, to be read one at a time.
        new: parameters that the file doesn't have and isn't expected to: they keep their initial values.
        unused: the file's names that are expected not to be used.
        grid: tokens (T, H, W) of the file's position buffers, where it has them.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    grid: tuple[int, int, int] | None = None


def open_sora_weights(path_or_hub_id: str | Path, num_heads: int | None = None, **overrides: Any) -> Weights:
    """An Open-Sora v1.0 release, or any file with STDiT's names: see `STDiT.from_open_sora`."""
    checkpoint = open_checkpoint(local_path(path_or_hub_id))
    _require(checkpoint, ("stdit",), "STDiT.from_pixart")
    if checkpoint.config.get("_class_name") == "STDiT":
        raise WeightsError(f"{checkpoint.path}: a saved STDiT with its config.json: read it with STDiT.from_pretrained")
    tensors = dict(stdit_items(checkpoint.tensors, "stdit"))
    found = _sizes(checkpoint, tensors)
    if (found["variant"], overrides.get("variant")) == ("seq", "parallel"):
        found["variant"] = "parallel"  # the two hold the same tensors
    config = _configuration(checkpoint, found, num_heads, overrides)
    return _settle(checkpoint, config, fit(config, tensors))


def pixart_weights(
    path_or_hub_id: str | Path,
    num_heads: int | None = None,
    *,
    ema: bool = False,
    null_caption: Tensor | None = None,
    **overrides: Any,
) -> Weights:
    """A PixArt-alpha release in either layout: see `STDiT.from_pixart`."""
    checkpoint = open_checkpoint(local_path(path_or_hub_id), "state_dict_ema" if ema else None)
    _require(checkpoint, ("pixart", "pixart-diffusers"), "STDiT.from_open_sora")
    layout = recognised(checkpoint)
    _check_diffusers_config(checkpoint)
    tensors = dict(stdit_items(checkpoint.tensors, layout))
    if null_caption is not None:
        tensors[NULL_CAPTION] = LazyTensor.of(null_caption.detach())
    variant = overrides.pop("variant", "seq")
    found = {**_sizes(checkpoint, tensors), "variant": variant}
    config = _configuration(checkpoint, found, num_heads, overrides)
    return _settle(checkpoint, config, fit(config, tensors, *from_images(layout, variant)))


def from_images(layout: Layout, variant: str) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """Two tests on names: what a variant has that a PixArt file of this layout lacks, and what it doesn't use of it."""

    def new(name: str) -> bool:
        return ".attn_temp." in name or (name == NULL_CAPTION and layout == "pixart-diffusers")

    def unused(name: str) -> bool:
        spatial = re.match(r"blocks\.(\d+)\.attn\.", name)
        return variant == "latte" and spatial is not None and int(spatial[1]) % 2 == 1  # odd blocks attend over time

    return new, unused


def _settle(checkpoint: Checkpoint, config: dict[str, Any], result: KeyMatch) -> Weights:
    """The weights, if they fit without complaints."""
    if result.complaints:
        raise WeightsError(f"{checkpoint.path}: does not fit this STDiT ({config['variant']}): {result.complaints}")
    unused = tuple(name for name in checkpoint.tensors if expected_unused(name)) + result.unused
    grid = position_scales(checkpoint.tensors)[1]
    return Weights(checkpoint.path, config, result.tensors, result.new, unused, grid)


def build(cls: "type[STDiT]", weights: Weights, dtype: torch.dtype | None = torch.float32) -> "STDiT":
    """A model of this class with these weights, in evaluation mode; warns of what changes its outputs.

    Args:
        dtype: of the parameters; None keeps each tensor's own.
    """
    if NULL_CAPTION in weights.new:
        warnings.warn(
            f"{weights.path}: this layout has no null caption, so it keeps a random start and guidance needs training "
            "first: pass null_caption=, the text encoder's states of the empty prompt",
            stacklevel=3,
        )
    if any(MICRO_CONDITIONS.fullmatch(name) for name in weights.unused):
        warnings.warn(
            f"{weights.path}: its micro-conditions on size and aspect ratio are not used; outputs differ from PixArt's",
            stacklevel=3,
        )
    # Initial values are only drawn where some will be kept: for the XL sizes that takes seconds.
    with torch.device("cpu" if weights.new else "meta"):
        model = cls(**weights.config)
    nn.Module.to(model, dtype or weights.tensors["x_embedder.proj.weight"].dtype)
    for name, lazy in weights.tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        value = lazy.read().to(dtype or lazy.dtype, copy=True)
        setattr(module, leaf, nn.Parameter(value) if leaf in module._parameters else value)
    return model.eval()


_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def checked_folder(path_or_hub_id: str | Path, options: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of a saved model whose tensors are exactly those of its config.json, for diffusers to read.

    diffusers' own from_pretrained takes a file with nothing in it, and shards that lack what their index promises.

    Args:
        options: from_pretrained's.

    Returns:
        The folder, and the options that are left when it has been found.

    Raises:
        FileNotFoundError: no such folder, or no config.json or weights in it.
        WeightsError: another class's config, missing, unexpected or differently shaped tensors, or the Hub fails.
    """
    # Without accelerate diffusers asks for it, at length, and then loads in the ordinary way.
    options = {"low_cpu_mem_usage": is_accelerate_available(), **options}
    if options.get("use_safetensors") is None:  # None would fall back to pickles
        options["use_safetensors"] = True
    if "dtype" in options:  # older diffusers know it by the other name alone, newer ones by both
        options["torch_dtype"] = options.pop("dtype")
    for_hub = {key: options.pop(key) for key in _HUB_OPTIONS if key in options}
    folder = local_path(path_or_hub_id, options.pop("subfolder", None), **for_hub)
    saved_weights(folder, options.get("variant"), options["use_safetensors"])
    return folder, options


def saved_weights(folder: Path, infix: str | None = None, safetensors: bool = True) -> Weights:
    """What `save_pretrained` wrote.

    Args:
        infix: "fp16" for diffusion_pytorch_model.fp16.safetensors.
        safetensors: or else torch archives (.bin).

    Raises:
        FileNotFoundError: no config.json or no weights.
        WeightsError: another class's config, or tensors that aren't exactly its own.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json in it, so not a saved STDiT")
    saved = read_json(folder / "config.json")
    if saved.get("_class_name") != "STDiT":
        hint = "; read it with STDiT.from_pixart" if saved.get("_class_name") == "PixArtTransformer2DModel" else ""
        raise WeightsError(f"{folder / 'config.json'}: is of {saved.get('_class_name')}, not of STDiT{hint}")
    stem, suffix = "diffusion_pytorch_model", "safetensors" if safetensors else "bin"
    dotted = f".{infix}" if infix else ""
    names = [f"{stem}.{suffix}.index{dotted}.json", f"{stem}{dotted}.{suffix}"]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder}: no {names[1]} in it")
    config = {key: value for key, value in saved.items() if not key.startswith("_") and key != "quantization_config"}
    tensors = open_checkpoint(file).tensors
    if "quantization_config" not in saved:  # else they are packed as the quantiser likes, which diffusers checks
        complaints = fit(config, tensors).complaints
        if complaints:
            raise WeightsError(f"{file}: does not fit its config.json: {complaints}")
    return Weights(file, config, tensors)


def _require(checkpoint: Checkpoint, layouts: tuple[Layout, ...], instead: str) -> None:
    layout = recognised(checkpoint)
    if layout not in layouts:
        hint = f": read it with {instead}" if layout != "latte-diffusers" else ""
        raise WeightsError(f"{checkpoint.path}: the layout is {LAYOUT_NAMES[layout]}{hint}")


def _sizes(checkpoint: Checkpoint, tensors: dict[str, LazyTensor]) -> dict[str, Any]:
    try:
        return sizes(tensors)
    except WeightsError as error:
        raise WeightsError(f"{checkpoint.path}: {error}") from None


def _configuration(
    checkpoint: Checkpoint, found: dict[str, Any], num_heads: int | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    """What was found in the file and what was asked for, which may not contradict each other."""
    if "patch_size" in overrides:
        overrides["patch_size"] = tuple(overrides["patch_size"])
    wrong = [f"{key}={value} was asked for, the file has {found[key]}"
             for key, value in overrides.items() if key in found and found[key] != value]  # fmt: skip
    told = checkpoint.config.get("num_attention_heads")
    if None not in (num_heads, told) and num_heads != told:
        wrong.append(f"num_heads={num_heads} was asked for, its config.json has {told}")
    if wrong:
        raise WeightsError(f"{checkpoint.path}: {'; '.join(wrong)}")
    heads = num_heads or told or found["hidden_size"] / PUBLISHED_HEAD_WIDTH
    if heads != int(heads):
        raise WeightsError(
            f"{checkpoint.path}: the number of heads doesn't show in the tensors, and a width of "
            f"{found['hidden_size']} is not a multiple of {PUBLISHED_HEAD_WIDTH}: pass num_heads"
        )
    scales = position_scales(checkpoint.tensors)[0]
    if checkpoint.config.get("_class_name") == "PixArtTransformer2DModel":
        native = max(checkpoint.config.get("sample_size", 128) // 64, 1)
        scales["space_scale"] = float(checkpoint.config.get("interpolation_scale") or native)
    return {**found, "num_heads": int(heads), **scales, **overrides}


def _check_diffusers_config(checkpoint: Checkpoint) -> None:
    """What of a PixArtTransformer2DModel doesn't show in its tensors."""
    for key, value in (("activation_fn", "gelu-approximate"), ("norm_type", "ada_norm_single")):
        if checkpoint.config.get(key, value) != value:
            raise WeightsError(
                f"{checkpoint.path.parent / 'config.json'}: {key} is {checkpoint.config[key]!r}; {value!r} expected"
            )
