"""Write a pipeline folder, and check one before it is loaded."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers

from stdit_model.convert import VAE_FACTOR, find
from stdit_model.errors import WeightsError, WeightsFileExistsError, WeightsFileNotFoundError
from stdit_model.model import STDiT
from stdit_model.sampling.bundled import bundled_names, bundled_pipeline
from stdit_model.sampling.components import (
    HUB_COMPONENTS,
    INDEX,
    PARTS,
    check_class,
    find_index,
    hub_index,
    load_part,
    own_parts,
    require,
)
from stdit_model.sampling.schedulers import flow_scheduler, iddpm_scheduler
from stdit_model.weights.adapters import merge_adapters
from stdit_model.weights.folders import read_json
from stdit_model.weights.hub import HUB_OPTIONS, hub_options, split_hub_id
from stdit_model.weights.load import NULL_CAPTION, Weights, build

# Hub ids of the components that Open-Sora 1.0 was trained with.
VAE_ID = "stabilityai/sd-vae-ft-ema"
SIGMA_VAE_ID = "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers/vae"  # SDXL's
T5_ID = "DeepFloyd/t5-v1_1-xxl"
_WEIGHTS = ("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.index.json")


def write_pipeline(
    source: str | Path,
    destination: str | Path,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    scheduler: str | Path | None = None,
    loras: Sequence[tuple[str, float]] = (),
    max_shard_size: str = "10GB",
    **options: Any,
) -> STDiT:
    """Convert weights of any layout into a pipeline folder, which `STDiTPipeline.from_pretrained` loads.

    What the source records beside the weights is kept: of a pipeline its components and the defaults of its calls.

    Args:
        source: a file, folder or Hub id.
        destination: a new or empty folder.
        vae, text_encoder, tokenizer: each a local folder, which is copied, or a Hub id ("owner/name" or
            "owner/name/folder"), which is recorded; by default the pipeline's own, or for weights alone the Hub ids of
            those that Open-Sora 1.0 was trained with. A text encoder's folder may hold its tokenizer.
        scheduler: the same, or "iddpm" or "flow"; by default the pipeline's own, or for weights alone "iddpm" for a
            model that predicts its variance, "flow" for others.
        loras: LoRA adapters to merge into the weights, each with the factor of its update; see
            `stdit_model.weights.adapters.load_adapters`.
        max_shard_size: of the transformer's safetensors files.
        options: of `stdit_model.convert.find`.

    Returns:
        The converted model.

    Raises:
        WeightsFileExistsError: the destination is not empty.
        WeightsFileNotFoundError, WeightsError: as `read`; or a component's folder lacks its configuration.
    """
    folder = Path(destination)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsFileExistsError(f"{folder}: already exists and is not empty; name another folder")
    own = own_parts(source)
    found = find(source, **options)
    if tokenizer is None and text_encoder is not None and (Path(text_encoder) / "tokenizer_config.json").is_file():
        tokenizer = text_encoder
    parts = {
        "vae": vae or own.get("vae", vae_id(found)),
        "text_encoder": text_encoder or own.get("text_encoder", T5_ID),
        "tokenizer": tokenizer or own.get("tokenizer", T5_ID),
    }
    scheduler = scheduler or own.get("scheduler")
    schedulers = {"iddpm": iddpm_scheduler, "flow": flow_scheduler}
    if scheduler is not None and scheduler not in schedulers:
        parts["scheduler"] = scheduler
    copied = {name: Path(part).expanduser() for name, part in parts.items() if Path(part).expanduser().is_dir()}
    named = {name: str(part) for name, part in parts.items() if name not in copied}
    for name, part in named.items():
        if split_hub_id(part) is None:
            raise WeightsFileNotFoundError(f"{part}: neither a folder nor a Hub id (owner/name) for the {name}")
    classes = {name: _component_class(name, path) for name, path in copied.items()}

    model = merge_adapters(build(STDiT, found, dtype=None), loras)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
    classes["transformer"] = ("stdit_model", "STDiT")
    for name, path in copied.items():
        weights = shutil.ignore_patterns(*_WEIGHTS) if name == "tokenizer" else None  # T5's folder may hold both
        shutil.copytree(path, folder / name, ignore=weights)
    if "scheduler" not in parts:
        made = schedulers[str(scheduler or ("iddpm" if model.config.learn_sigma else "flow"))]()
        made.save_pretrained(folder / "scheduler")
        classes["scheduler"] = ("diffusers", type(made).__name__)
    index = {
        "_class_name": "STDiTPipeline",
        "_diffusers_version": diffusers.__version__,
        HUB_COMPONENTS: named,
        **{name: [None, None] for name in named},
        **{name: list(of) for name, of in classes.items()},
        **clip_size(model, found),
        **default_negative_prompt(found),
        **_call_defaults(source),
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
    return model


def _call_defaults(source: str | Path) -> dict[str, Any]:
    """Return the settings that a pipeline's model_index.json records beside its components."""
    index = find_index(source)
    found = read_json(index) if index is not None else {}
    if found.get("_class_name") != "STDiTPipeline":
        return {}
    return {key: value for key, value in found.items() if not key.startswith("_") and not isinstance(value, list)}


def _component_class(name: str, folder: Path) -> tuple[str, str]:
    """Find library and class of a component's folder, as model_index.json records them."""
    file, key, library, default = {
        "vae": ("config.json", "_class_name", "diffusers", None),
        "scheduler": ("scheduler_config.json", "_class_name", "diffusers", None),
        "text_encoder": ("config.json", "", "transformers", "T5EncoderModel"),
        "tokenizer": ("tokenizer_config.json", "tokenizer_class", "transformers", "T5Tokenizer"),
    }[name]
    if not (folder / file).is_file():
        raise WeightsFileNotFoundError(f"{folder}: no {file} in this folder, so it is not a {name}")
    found = read_json(folder / file).get(key, default)
    if not isinstance(found, str):
        raise WeightsError(f"{folder / file}: has no class ({key})")
    return library, found


def vae_id(found: Weights) -> str:
    """Return the Hub id of the VAE that published weights were trained with."""
    return SIGMA_VAE_ID if found.sigma else VAE_ID


def clip_size(model: STDiT, found: Weights) -> dict[str, int]:
    """Return a pipeline's default clip size in frames and pixels, if the file's position buffers show it."""
    if found.grid is None:
        return {}
    sizes = [tokens * patch for tokens, patch in zip(found.grid, model.config.patch_size, strict=True)]
    return {"num_frames": sizes[0], "height": sizes[1] * VAE_FACTOR, "width": sizes[2] * VAE_FACTOR}


def default_negative_prompt(found: Weights) -> dict[str, str]:
    """Return the empty negative prompt for weights without a null caption, as PixArt's in diffusers' layout."""
    return {"negative_prompt": ""} if NULL_CAPTION in found.new else {}


def find_pipeline(name: str | Path, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Find a pipeline, check that it is whole, and load the components that it records by Hub id.

    Args:
        name: its folder, the name of a bundled pipeline, or a Hub id; a local folder takes precedence.
        options: of `STDiTPipeline.from_pretrained`.

    Returns:
        The folder or Hub id, and the options for diffusers.

    Raises:
        WeightsFileNotFoundError: no such folder, bundled pipeline or Hub id; or a component is missing.
        WeightsError: not available from the Hub; the message says what to download or pass.
    """
    folder = Path(name).expanduser()
    bundled = bundled_pipeline(str(name))
    if folder.is_dir():
        if bundled is not None and not (folder / INDEX).is_file():
            raise WeightsFileNotFoundError(
                f"{folder}: no {INDEX} in this folder, which takes precedence over the bundled pipeline of that name; "
                "rename it, or load from another working directory"
            )
    elif bundled is not None:
        folder = bundled
    if folder.is_dir():
        check_class(folder / INDEX, str(folder))
        options = {**named_parts(folder, options), **options}
        check_parts(folder, options)
        return str(folder), options
    if folder.is_file():
        raise WeightsFileNotFoundError(f"{folder}: a file, not a pipeline folder; STDiTPipeline.from_released loads it")
    repo = split_hub_id(str(name))
    if repo is None or repo[1] or Path(folder.parts[0]).is_dir():  # a mistyped path: do not wait for the network
        raise WeightsFileNotFoundError(f"{name}: no such folder; expected a pipeline folder, {_known_names(str(name))}")
    index = hub_index(repo[0], options)
    check_class(index, repo[0])
    return repo[0], {**named_parts(index.parent, options), **options, **hub_options()}


def _known_names(name: str) -> str:
    names = bundled_names()
    if name == "demo" and not names:
        return "or stdit-train, which comes with the pipeline demo and is not installed: pip install stdit-train"
    return "a Hub id (owner/name)" + (f" or a bundled pipeline ({', '.join(names)})" if names else "")


def named_parts(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Load the components that model_index.json records by Hub id, as `stdit weights convert` writes it.

    Args:
        folder: of the pipeline.
        options: of `DiffusionPipeline.from_pretrained`: components by name, which replace those of the folder; dtype,
            quantization_config, and the options of downloads but revision, which is of the pipeline's own repository.

    Raises:
        WeightsError: one is not available from the Hub; the message says what to download or pass.
    """
    index = folder / INDEX
    names = read_json(index).get(HUB_COMPONENTS, {}) if index.is_file() else {}
    wanted = {part: name for part, name in names.items() if part not in options}
    require(wanted, **_part_options("", options))
    return {part: load_part(part, name, **_part_options(part, options)) for part, name in wanted.items()}


def _part_options(part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for one component among those of a pipeline; those of downloads alone for ""."""
    found = {key: options[key] for key in HUB_OPTIONS if key in options and key != "revision"}
    if part not in ("vae", "text_encoder"):
        return found
    dtype = options.get("dtype", options.get("torch_dtype"))
    if isinstance(dtype, Mapping):
        dtype = dtype.get(part, dtype.get("default"))
    quantization: Any = options.get("quantization_config")
    if quantization is not None:  # diffusers has no public function for it
        quantization = quantization._resolve_quant_config(part == "vae", part)
    chosen = {"dtype" if part == "text_encoder" else "torch_dtype": dtype, "quantization_config": quantization}
    return found | {key: value for key, value in chosen.items() if value is not None}


def check_parts(folder: Path, replaced: Mapping[str, Any]) -> None:
    """Check that a pipeline folder has every component that its model_index.json lists.

    Args:
        folder: of the pipeline.
        replaced: components by name that the caller passes.

    Raises:
        WeightsFileNotFoundError: no model_index.json, or components are missing, all of which are named.
    """
    index = folder / INDEX
    if not index.is_file():
        raise WeightsFileNotFoundError(f"{folder}: no {INDEX} in this folder, so it is not a pipeline")
    named = {name for name, value in read_json(index).items() if isinstance(value, list) and value[0] is not None}
    expected = {"transformer", *PARTS} - set(replaced)
    missing = sorted(part for part in expected if part in named and not any((folder / part).glob("*.json")))
    unnamed = sorted(expected - named)
    if missing or unnamed:
        raise WeightsFileNotFoundError(
            f"{folder}: this pipeline folder lacks {', '.join(missing + unnamed)}; copy or download all of it again"
        )
