"""Weights out: a whole pipeline folder, or the Open-Sora v1.0 layout back."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from stdit_model.embed import spatial_positions, temporal_positions
from stdit_model.errors import WeightsError, few
from stdit_model.model import STDiT
from stdit_model.weights.files import open_checkpoint, read_json
from stdit_model.weights.hub import local_path, split_hub_id
from stdit_model.weights.layouts import LAYOUT_NAMES, recognised
from stdit_model.weights.load import Weights, build, open_sora_weights, pixart_weights, saved_weights

# What Open-Sora 1.0 was trained with. A pipeline finds these by their Hub ids, under "_hub_components" of its
# model_index.json, unless they are copied into its folder.
VAE = "stabilityai/sd-vae-ft-ema"
T5 = "DeepFloyd/t5-v1_1-xxl"
HUB_COMPONENTS = "_hub_components"
_VAE_FACTOR = 8  # pixels to a latent, of every VAE that these layouts were trained with


def read(
    path_or_hub_id: str | Path,
    num_heads: int | None = None,
    *,
    ema: bool = False,
    null_caption: Tensor | None = None,
    **overrides: Any,
) -> tuple[STDiT, Weights]:
    """A model from whatever layout this is, in the file's own dtype; see `find`."""
    found = find(path_or_hub_id, num_heads, ema=ema, null_caption=null_caption, **overrides)
    return build(STDiT, found, dtype=None), found


def find(
    path_or_hub_id: str | Path,
    num_heads: int | None = None,
    *,
    ema: bool = False,
    null_caption: Tensor | None = None,
    **overrides: Any,
) -> Weights:
    """Weights of whatever layout this is, not read yet: a saved STDiT, a pipeline, Open-Sora v1, PixArt.

    Args:
        num_heads, overrides: as in `STDiT.from_open_sora` and `STDiT.from_pixart`; not for a saved STDiT.
        ema, null_caption: for PixArt, as in `STDiT.from_pixart`.

    Raises:
        FileNotFoundError: nothing is there.
        WeightsError: it can't be read, or an argument isn't for what it is.
    """
    path = local_path(path_or_hub_id)
    folder = path / "transformer" if (path / "model_index.json").is_file() else path
    if (folder / "config.json").is_file() and read_json(folder / "config.json").get("_class_name") == "STDiT":
        if num_heads is not None or overrides:
            given = few(sorted([*overrides, *(["num_heads"] if num_heads is not None else [])]))
            raise WeightsError(f"{folder}: a saved STDiT has its own {given}, in its config.json")
        layout, found = "stdit", saved_weights(folder)
    elif (layout := recognised(open_checkpoint(path, "state_dict_ema" if ema else None))) == "stdit":
        found = open_sora_weights(path, num_heads, **overrides)
    else:
        found = pixart_weights(path, num_heads, ema=ema, null_caption=null_caption, **overrides)
    if layout == "stdit" and (ema or null_caption is not None):
        raise WeightsError(f"{path}: {LAYOUT_NAMES['stdit']}: ema and null_caption are for PixArt's layouts")
    return found


def read_null_caption(path: str | Path) -> Tensor:
    """The one tensor of a file: the text encoder's states of the empty prompt, [L, caption_channels].

    Raises:
        FileNotFoundError: nothing is there.
        WeightsError: it holds another number of tensors, or one of another shape.
    """
    tensors = open_checkpoint(Path(path)).tensors
    if len(tensors) != 1 or len(next(iter(tensors.values())).shape) != 2:
        raise WeightsError(f"{path}: one tensor [tokens, caption channels] expected, not {few(sorted(tensors))}")
    return next(iter(tensors.values())).read()


def write_pipeline(
    source: str | Path,
    destination: str | Path,
    *,
    vae: str | Path = VAE,
    text_encoder: str | Path = T5,
    tokenizer: str | Path = T5,
    scheduler: str | Path | None = None,
    max_shard_size: str = "10GB",
    **options: Any,
) -> STDiT:
    """Convert weights of any layout into a pipeline folder, which `STDiTPipeline.from_pretrained` reads.

    Args:
        source: a file, folder or Hub id.
        destination: a new or empty folder.
        vae, text_encoder, tokenizer: each a local folder, which is copied, or a Hub id ("owner/name" or
            "owner/name/folder"), which is recorded.
        scheduler: the same, or "iddpm" or "flow", which are written out; by default "iddpm" for a model that
            predicts its variance and "flow" for one that doesn't.
        max_shard_size: of the transformer's safetensors files.
        options: of `read`.

    Raises:
        FileExistsError: the destination holds something.
        FileNotFoundError, WeightsError: as `read`; or a component's folder is not one.
    """
    folder = Path(destination)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: already there: name a new folder, or empty this one")
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    schedulers = {"iddpm": iddpm_scheduler, "flow": flow_scheduler}
    if scheduler is not None and scheduler not in schedulers:
        parts["scheduler"] = scheduler
    copied = {name: Path(part).expanduser() for name, part in parts.items() if Path(part).expanduser().is_dir()}
    named = {name: str(part) for name, part in parts.items() if name not in copied}
    for name, part in named.items():
        if split_hub_id(part) is None:
            raise FileNotFoundError(f"{part}: neither a folder nor a Hub id (owner/name) for the {name}")
    classes = {name: _component_class(name, path) for name, path in copied.items()}

    model, found = read(source, **options)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
    classes["transformer"] = ("stdit_model", "STDiT")
    for name, path in copied.items():
        shutil.copytree(path, folder / name)
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
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")
    return model


def write_open_sora(
    source: str | Path, destination: str | Path, *, grid: tuple[int, int, int] | None = None, **options: Any
) -> STDiT:
    """Write weights under the names of the Open-Sora v1.0 release, its tensors at the top level.

    Its position buffers belong to one size of clip: they are written where that is known, from `grid`, from the
    source's own buffers, or from the clip size that a pipeline folder records. Otherwise they are left out.

    Args:
        source: a file, folder or Hub id of any layout.
        destination: a .safetensors file, or a torch archive by any other name.
        grid: tokens (T, H, W) of the position buffers.
        options: of `read`.

    Raises:
        FileExistsError: the destination is there already.
        FileNotFoundError, WeightsError: as `read`; or a variant that Open-Sora v1.0 doesn't have.
    """
    file = Path(destination)
    if file.exists():
        raise FileExistsError(f"{file}: already there: name another file, or remove it")
    model, found = read(source, **options)
    config = model.config
    if config.variant != "seq":
        raise WeightsError(f"{source}: Open-Sora v1.0 has the variant seq alone, this is {config.variant}")
    tensors: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    grid = grid or found.grid or _recorded_grid(Path(source), config)
    if grid is not None:
        frames, rows, columns = grid
        dtype = model.x_embedder.proj.weight.dtype
        space = spatial_positions(config.hidden_size, rows, columns, config.space_scale)
        time = temporal_positions(config.hidden_size, frames, config.time_scale)
        tensors |= {"pos_embed": space[None].to(dtype), "pos_embed_temporal": time[None].to(dtype)}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return model


def iddpm_scheduler() -> DDPMScheduler:
    """The sampler of Open-Sora 1.0: iDDPM's ancestral steps with a learned variance, evenly spaced from 999 to 0."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="learned_range",
        timestep_spacing="linspace",
        clip_sample=False,
    )


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps of rectified flow, timesteps 1000 * sigma."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)


def _component_class(name: str, folder: Path) -> tuple[str, str]:
    """Library and class of a component's local folder, as model_index.json records them."""
    file, key, library, default = {
        "vae": ("config.json", "_class_name", "diffusers", None),
        "scheduler": ("scheduler_config.json", "_class_name", "diffusers", None),
        "text_encoder": ("config.json", "", "transformers", "T5EncoderModel"),
        "tokenizer": ("tokenizer_config.json", "tokenizer_class", "transformers", "T5Tokenizer"),
    }[name]
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{folder}: no {file} in it, so not a {name}")
    found = read_json(folder / file).get(key, default)
    if not isinstance(found, str):
        raise WeightsError(f"{folder / file}: does not say its class ({key})")
    return library, found


def clip_size(model: STDiT, found: Weights) -> dict[str, int]:
    """The pipeline's default clip, in frames and pixels, where the position buffers of a video model tell it."""
    if found.grid is None:
        return {}
    sizes = [tokens * patch for tokens, patch in zip(found.grid, model.config.patch_size, strict=True)]
    return {"num_frames": sizes[0], "height": sizes[1] * _VAE_FACTOR, "width": sizes[2] * _VAE_FACTOR}


def _recorded_grid(folder: Path, config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The tokens of the clip that a pipeline's model_index.json records."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if not all(isinstance(index.get(key), int) for key in ("num_frames", "height", "width")):
        return None
    patch_t, patch_h, patch_w = config["patch_size"]
    return (
        index["num_frames"] // patch_t,
        index["height"] // _VAE_FACTOR // patch_h,
        index["width"] // _VAE_FACTOR // patch_w,
    )
