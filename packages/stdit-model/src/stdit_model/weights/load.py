"""Read a checkpoint strictly: which of its tensors goes where, with none missing and none left over.

`open_sora_weights`, `pixart_weights` and `saved_weights` turn a file into `Weights`: constructor arguments, and tensors
by STDiT's names, which stay in the file until they are read. `build` makes a model of them.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from diffusers.utils import is_accelerate_available
from torch import Tensor, nn

from stdit_model.errors import WeightsError, WeightsFileNotFoundError
from stdit_model.weights.files import (
    Checkpoint,
    StoredTensor,
    open_checkpoint,
    read_tensor,
)
from stdit_model.weights.folders import find_weights, read_json
from stdit_model.weights.hub import HUB_OPTIONS, local_path
from stdit_model.weights.layouts import (
    LAYOUT_NAMES,
    MICRO_CONDITIONS,
    SIGMA_TOKENS,
    Layout,
    expected_unused,
    infer_sizes,
    is_sigma,
    position_scales,
    recognise,
    stdit_items,
)
from stdit_model.weights.strict import KeyMatch, fit

NULL_CAPTION = "y_embedder.y_embedding"
PUBLISHED_HEAD_WIDTH = 72  # of every published STDiT and PixArt

M = TypeVar("M", bound=nn.Module)


class HasShapes(Protocol):
    """A model class that can tell the shapes of its tensors, as `STDiT` can."""

    @classmethod
    def parameter_shapes(cls, **arguments: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by name, given constructor arguments."""


@dataclass(frozen=True)
class Weights:
    """The weights of a model, still in their file.

    Attributes:
        path: the file.
        config: STDiT's constructor arguments.
        tensors: by STDiT's names; see `read`.
        new: tensors of the model that the file is expected to lack; they keep their initial values.
        unused: tensors of the file, by its own names, that are expected to be unused.
        grid: tokens (T, H, W) of the file's position buffers, if it has them.
        sigma: whether they are PixArt-Sigma's, which has another VAE than the other published models.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    grid: tuple[int, int, int] | None = None
    sigma: bool = False

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors by name, so that no more than one at a time is in memory."""
        for name, tensor in self.tensors.items():
            yield name, read_tensor(tensor)


def open_sora_weights(
    cls: type[HasShapes], path_or_hub_id: str | Path, num_heads: int | None = None, **overrides: Any
) -> Weights:
    """Open an Open-Sora v1.0 release, or any file with STDiT's names; see `WeightLoaders.from_open_sora`.

    Args:
        cls: the model's class, `STDiT`.
    """
    checkpoint = open_checkpoint(local_path(path_or_hub_id))
    _require(checkpoint, ("stdit",), "STDiT.from_pixart")
    if checkpoint.config.get("_class_name") == "STDiT":
        raise WeightsError(f"{checkpoint.path}: a saved STDiT with its config.json: read it with STDiT.from_pretrained")
    tensors = dict(stdit_items(checkpoint.tensors, "stdit"))
    found = _infer_sizes(checkpoint, tensors)
    if (found["variant"], overrides.get("variant")) == ("seq", "parallel"):
        found["variant"] = "parallel"  # the two hold the same tensors
    config = _configuration(checkpoint, found, num_heads, overrides)
    return _checked(checkpoint, config, fit(cls.parameter_shapes(**config), tensors))


def pixart_weights(
    cls: type[HasShapes],
    path_or_hub_id: str | Path,
    num_heads: int | None = None,
    *,
    ema: bool = False,
    null_caption: Tensor | None = None,
    **overrides: Any,
) -> Weights:
    """Open a PixArt-alpha or -Sigma release in either layout; see `WeightLoaders.from_pixart`.

    Args:
        cls: the model's class, `STDiT`.
    """
    checkpoint = open_checkpoint(local_path(path_or_hub_id), "state_dict_ema" if ema else None)
    _require(checkpoint, ("pixart", "pixart-diffusers"), "STDiT.from_open_sora")
    layout = recognise(checkpoint)
    _check_diffusers_config(checkpoint)
    tensors = dict(stdit_items(checkpoint.tensors, layout))
    if null_caption is not None:
        tensors[NULL_CAPTION] = null_caption.detach()
    variant = overrides.pop("variant", "seq")
    found = {**_infer_sizes(checkpoint, tensors), "variant": variant}
    sigma = is_sigma(checkpoint)
    if sigma:
        found.setdefault("model_max_length", SIGMA_TOKENS)
    config = _configuration(checkpoint, found, num_heads, overrides)
    match = fit(cls.parameter_shapes(**config), tensors, *from_images(layout, variant))
    return replace(_checked(checkpoint, config, match), sigma=sigma)


def from_images(layout: Layout, variant: str) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """Return two predicates on names: tensors that a PixArt file may lack, and those that the variant may not use."""

    def new(name: str) -> bool:
        return ".attn_temp." in name or (name == NULL_CAPTION and layout == "pixart-diffusers")

    def unused(name: str) -> bool:
        spatial = re.match(r"blocks\.(\d+)\.attn\.", name)
        return (
            variant == "latte" and spatial is not None and int(spatial[1]) % 2 == 1
        )  # odd blocks attend across frames

    return new, unused


def build(cls: type[M], weights: Weights, dtype: torch.dtype | None = torch.float32) -> M:
    """Build a model with these weights, in evaluation mode.

    Warns if micro-conditions of the file are not used. A null caption that the file lacks stays random; see
    `warn_of_random_null_caption`.

    Args:
        cls: the model's class, `STDiT`.
        weights: all of them are copied, so that the file may go away.
        dtype: of the parameters; None keeps that of each tensor.

    Raises:
        WeightsError: a tensor has values that are not finite.
    """
    if any(MICRO_CONDITIONS.fullmatch(name) for name in weights.unused):
        warnings.warn(
            f"{weights.path}: its micro-conditions on size and aspect ratio are not used; outputs differ from PixArt's",
            stacklevel=3,
        )
    # Initial values are drawn only if some are kept: for the XL sizes that takes seconds.
    with torch.device("cpu" if weights.new else "meta"):
        model = cls(**weights.config)
    nn.Module.to(model, dtype or weights.tensors["x_embedder.proj.weight"].dtype)
    state = {}
    for name, tensor in weights.read():
        if not tensor.isfinite().all():
            raise WeightsError(f"{weights.path}: {name} has values that are not finite: the training had diverged")
        state[name] = tensor.to(dtype or tensor.dtype, copy=True)
    model.load_state_dict(state, strict=not weights.new, assign=True)
    return model.eval()


def check_finite(model: nn.Module, path: Path) -> None:
    """Check the floating-point weights of a loaded model, which may be quantised or sharded.

    Raises:
        WeightsError: some are not finite.
    """
    for name, tensor in model.named_parameters():
        plain = type(tensor) is nn.Parameter and tensor.dtype.itemsize > 1 and not tensor.is_meta
        if plain and not tensor.isfinite().all():
            raise WeightsError(f"{path}: {name} has values that are not finite: the training had diverged")


def warn_of_random_null_caption(weights: Weights) -> None:
    """Warn if the null caption of a model with these weights is random, and so cannot stand for the empty prompt."""
    if NULL_CAPTION in weights.new:
        warnings.warn(
            f"{weights.path}: this layout has no null caption, so it stays random and guidance needs training first: "
            "pass null_caption=, the text encoder's states of the empty prompt",
            stacklevel=3,
        )


def checked_folder(
    cls: type[HasShapes], path_or_hub_id: str | Path, options: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Find the folder of a saved model and check that its tensors are exactly those of its config.json.

    diffusers' from_pretrained accepts an empty file, and shards that lack tensors of their index.

    Args:
        cls: the model's class, `STDiT`.
        path_or_hub_id: of the folder.
        options: of from_pretrained.

    Returns:
        The folder, and the options that from_pretrained still needs.

    Raises:
        WeightsFileNotFoundError: no such folder, or no config.json or weights in it.
        WeightsError: a config.json of another class; tensors missing, unexpected or of another shape; or the download
            from the Hub failed.
    """
    # Without accelerate diffusers would print a long notice, and then load in the ordinary way, or fail.
    low_memory = options.get("low_cpu_mem_usage", True) and is_accelerate_available()
    options = {**options, "low_cpu_mem_usage": low_memory}
    if options.get("use_safetensors") is None:  # None would fall back to pickles
        options["use_safetensors"] = True
    if "dtype" in options:  # which older versions of diffusers do not know
        options["torch_dtype"] = options.pop("dtype")
    for_hub = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
    folder = local_path(path_or_hub_id, options.pop("subfolder", None), **for_hub)
    saved_weights(cls, folder, _names(options.get("variant"), options["use_safetensors"]))
    return folder, options


def _names(infix: str | None, safetensors: bool) -> tuple[str, str]:
    """Names of the files that diffusers looks for: the index of a sharded model, or its only file."""
    stem, suffix = "diffusion_pytorch_model", "safetensors" if safetensors else "bin"
    dotted = f".{infix}" if infix else ""
    return f"{stem}.{suffix}.index{dotted}.json", f"{stem}{dotted}.{suffix}"


def saved_weights(cls: type[HasShapes], folder: Path, names: tuple[str, ...] | None = None) -> Weights:
    """Open what `save_pretrained` wrote, under any name that `find_weights` finds.

    Args:
        cls: the model's class, `STDiT`.
        folder: with a config.json.
        names: of its files, the only ones to look for.

    Raises:
        WeightsFileNotFoundError: no config.json or no weights.
        WeightsError: a config.json of another class; or tensors missing, unexpected or of another shape.
    """
    if not (folder / "config.json").is_file():
        raise WeightsFileNotFoundError(f"{folder}: no config.json in it, so not a saved STDiT")
    saved = read_json(folder / "config.json")
    if saved.get("_class_name") != "STDiT":
        hint = "; read it with STDiT.from_pixart" if saved.get("_class_name") == "PixArtTransformer2DModel" else ""
        raise WeightsError(f"{folder / 'config.json'}: is of {saved.get('_class_name')}, not of STDiT{hint}")
    if names is None:
        file: Path | None = find_weights(folder)
    else:
        file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise WeightsFileNotFoundError(f"{folder}: no {(names or ('weights',))[-1]} in it")
    config = {key: value for key, value in saved.items() if not key.startswith("_") and key != "quantization_config"}
    tensors: dict[str, StoredTensor] = {**open_checkpoint(file).tensors}
    if "quantization_config" not in saved:  # quantised tensors have shapes of their own, which diffusers checks
        complaints = fit(cls.parameter_shapes(**config), tensors).complaints
        if complaints:
            raise WeightsError(f"{file}: does not fit its config.json: {complaints}")
    return Weights(file, config, tensors)


def _checked(checkpoint: Checkpoint, config: dict[str, Any], match: KeyMatch) -> Weights:
    """Return the weights of a match without complaints, or raise WeightsError."""
    if match.complaints:
        raise WeightsError(f"{checkpoint.path}: does not fit this STDiT ({config['variant']}): {match.complaints}")
    unused = tuple(name for name in checkpoint.tensors if expected_unused(name)) + match.unused
    grid = position_scales(checkpoint.tensors)[1]
    return Weights(checkpoint.path, config, match.tensors, match.new, unused, grid)


def _require(checkpoint: Checkpoint, layouts: tuple[Layout, ...], instead: str) -> None:
    layout = recognise(checkpoint)
    if layout not in layouts:
        hint = f": read it with {instead}" if layout != "latte-diffusers" else ""
        raise WeightsError(f"{checkpoint.path}: the layout is {LAYOUT_NAMES[layout]}{hint}")


def _infer_sizes(checkpoint: Checkpoint, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    try:
        return infer_sizes(tensors)
    except WeightsError as error:
        raise WeightsError(f"{checkpoint.path}: {error}") from None


def _configuration(
    checkpoint: Checkpoint, found: dict[str, Any], num_heads: int | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Merge what was inferred from the file with the caller's arguments, which may not contradict it."""
    if "patch_size" in overrides:
        overrides["patch_size"] = tuple(overrides["patch_size"])
    wrong = [f"{key}={value} was requested, but the file has {found[key]}"
             for key, value in overrides.items() if key in found and found[key] != value]  # fmt: skip
    told = checkpoint.config.get("num_attention_heads", checkpoint.config.get("num_heads"))
    if None not in (num_heads, told) and num_heads != told:
        wrong.append(f"num_heads={num_heads} was requested, but the checkpoint has {told}")
    if wrong:
        raise WeightsError(f"{checkpoint.path}: {'; '.join(wrong)}")
    heads = num_heads or told or found["hidden_size"] / PUBLISHED_HEAD_WIDTH
    if heads != int(heads):
        raise WeightsError(
            f"{checkpoint.path}: the number of heads cannot be inferred, since the width of "
            f"{found['hidden_size']} is not a multiple of {PUBLISHED_HEAD_WIDTH}: pass num_heads"
        )
    scales = {key: value for key, value in checkpoint.config.items() if key in ("space_scale", "time_scale")}
    scales |= position_scales(checkpoint.tensors)[0]
    if checkpoint.config.get("_class_name") == "PixArtTransformer2DModel":
        native = max(checkpoint.config.get("sample_size", 128) // 64, 1)
        scales["space_scale"] = float(checkpoint.config.get("interpolation_scale") or native)
    return {**found, "num_heads": int(heads), **scales, **overrides}


def _check_diffusers_config(checkpoint: Checkpoint) -> None:
    """Check settings of a PixArtTransformer2DModel that its tensors do not show."""
    for key, value in (("activation_fn", "gelu-approximate"), ("norm_type", "ada_norm_single")):
        if checkpoint.config.get(key, value) != value:
            raise WeightsError(
                f"{checkpoint.path.parent / 'config.json'}: {key} is {checkpoint.config[key]!r}; expected {value!r}"
            )
