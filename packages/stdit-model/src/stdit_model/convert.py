"""Read weights of any layout, describe them, and write the Open-Sora v1.0 layout."""

import json
import math
import secrets
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stdit_model.embed import spatial_positions, temporal_positions
from stdit_model.errors import WeightsError, WeightsFileExistsError, few, reason
from stdit_model.model import STDiT
from stdit_model.presets import VARIANTS
from stdit_model.weights.files import SETTINGS, open_checkpoint
from stdit_model.weights.folders import read_json
from stdit_model.weights.hub import local_path
from stdit_model.weights.layouts import (
    LAYOUT_NAMES,
    expected_unused,
    infer_sizes,
    is_sigma,
    position_scales,
    recognise,
    stdit_items,
)
from stdit_model.weights.load import (
    NULL_CAPTION,
    PUBLISHED_HEAD_WIDTH,
    Weights,
    build,
    from_images,
    open_sora_weights,
    pixart_weights,
    saved_weights,
    warn_of_random_null_caption,
)
from stdit_model.weights.strict import fit

VAE_FACTOR = 8  # pixels per latent of the VAE that all published models were trained with


def read(
    path_or_hub_id: str | Path,
    num_heads: int | None = None,
    *,
    ema: bool = False,
    null_caption: Tensor | None = None,
    **overrides: Any,
) -> tuple[STDiT, Weights]:
    """Load a model of any layout in the dtype of its file; arguments and errors are those of `find`."""
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
    """Open weights of any layout: a saved STDiT, a pipeline folder, Open-Sora v1.0 or PixArt-alpha.

    Args:
        path_or_hub_id: a file, a folder or a Hub id.
        num_heads, overrides: as in `STDiT.from_open_sora` and `STDiT.from_pixart`; not for a saved STDiT.
        ema, null_caption: for PixArt, as in `STDiT.from_pixart`.

    Raises:
        WeightsFileNotFoundError: no such file.
        WeightsError: it cannot be read, or its layout does not take one of the arguments.
    """
    path = local_path(path_or_hub_id)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if (folder / "config.json").is_file() and read_json(folder / "config.json").get("_class_name") == "STDiT":
        if num_heads is not None or overrides:
            given = few(sorted([*overrides, *(["num_heads"] if num_heads is not None else [])]))
            raise WeightsError(f"{folder}: a saved STDiT has its own {given}, in its config.json")
        layout, found = "stdit", saved_weights(STDiT, folder)
    elif (layout := recognise(open_checkpoint(path, "state_dict_ema" if ema else None))) == "stdit":
        found = open_sora_weights(STDiT, path, num_heads, **overrides)
    else:
        found = pixart_weights(STDiT, path, num_heads, ema=ema, null_caption=null_caption, **overrides)
    if layout == "stdit" and (ema or null_caption is not None):
        raise WeightsError(f"{path}: {LAYOUT_NAMES['stdit']}: ema and null_caption are for PixArt's layouts")
    return found


def read_null_caption(path: str | Path) -> Tensor:
    """Read the text encoder's states of the empty prompt, [L, caption_channels], the only tensor of a file.

    Raises:
        WeightsFileNotFoundError: no such file.
        WeightsError: another number of tensors, or one of another shape.
    """
    tensors = open_checkpoint(Path(path)).tensors
    if len(tensors) != 1 or len(next(iter(tensors.values())).shape) != 2:
        raise WeightsError(f"{path}: expected one tensor [tokens, caption channels], not {few(sorted(tensors))}")
    return next(iter(tensors.values()))


def write_open_sora(
    source: str | Path, destination: str | Path, *, grid: tuple[int, int, int] | None = None, **options: Any
) -> STDiT:
    """Write weights in the layout of the Open-Sora v1.0 release.

    Number of heads and position scales, which the layout has no place for, go into the file's metadata, where this
    package finds them and others do not look. Its position buffers are for one clip size. They are written if it is
    known from `grid`, the source's buffers or the clip size in a pipeline folder, and left out otherwise.

    Args:
        source: a file, folder or Hub id of any layout.
        destination: a .safetensors file, or a torch archive by any other name.
        grid: tokens (T, H, W) of the position buffers.
        options: of `read`.

    Returns:
        The converted model.

    Raises:
        WeightsFileExistsError: the destination exists.
        WeightsFileNotFoundError, WeightsError: as `read`; a folder that cannot be created; or a variant that
            Open-Sora v1.0 does not have.
    """
    file = Path(destination)
    if file.exists():
        raise WeightsFileExistsError(f"{file}: already exists: name another file, or remove it")
    model, found = read(source, **options)
    warn_of_random_null_caption(found)
    config = model.config
    if config.variant != "seq":
        raise WeightsError(f"{source}: Open-Sora v1.0 has only the variant seq, this is {config.variant}")
    tensors: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    grid = grid or found.grid or _recorded_grid(Path(source), config)
    if grid is not None:
        frames, rows, columns = grid
        dtype = model.x_embedder.proj.weight.dtype
        space = spatial_positions(config.hidden_size, rows, columns, config.space_scale)
        time = temporal_positions(config.hidden_size, frames, config.time_scale)
        tensors |= {"pos_embed": space[None].to(dtype), "pos_embed_temporal": time[None].to(dtype)}
    settings = {key: config[key] for key in ("num_heads", "space_scale", "time_scale")}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{file}: cannot create its folder ({reason(error)}); name another file") from error
    partial = file.with_name(f".{file.name}.{secrets.randbelow(10**9)}.part")
    try:
        if file.suffix == ".safetensors":
            save_file(tensors, partial, {SETTINGS: json.dumps(settings)})
        else:
            state = OrderedDict(tensors)
            state._metadata = {SETTINGS: settings}  # type: ignore[attr-defined]  # as torch has it on a state dict
            torch.save(state, partial)
        partial.replace(file)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{file}: cannot be written ({reason(error)})") from error
    finally:
        partial.unlink(missing_ok=True)
    return model


def _recorded_grid(folder: Path, config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Tokens (T, H, W) of the clip size in a pipeline's model_index.json."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if not all(isinstance(index.get(key), int) for key in ("num_frames", "height", "width")):
        return None
    patch_t, patch_h, patch_w = config["patch_size"]
    return (
        index["num_frames"] // patch_t,
        index["height"] // VAE_FACTOR // patch_h,
        index["width"] // VAE_FACTOR // patch_w,
    )


def describe(path_or_hub_id: str | Path, ema: bool = False) -> list[str]:
    """Describe a checkpoint in lines for people, without reading tensors other than the position buffers.

    Args:
        path_or_hub_id: a file, a folder or a Hub id.
        ema: describe `state_dict_ema` of a PixArt .pth.

    Raises:
        WeightsFileNotFoundError: no such file.
        WeightsError: not a checkpoint, or of no known layout.
    """
    checkpoint = open_checkpoint(local_path(path_or_hub_id), "state_dict_ema" if ema else None)
    layout = recognise(checkpoint)
    tensors = dict(stdit_items(checkpoint.tensors, layout))
    entry = f", under {checkpoint.entry!r}" if checkpoint.entry else ""
    beside = f" (beside it: {', '.join(checkpoint.beside)})" if checkpoint.beside else ""
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    parameters = sum(math.prod(tensor.shape) for name, tensor in tensors.items() if name != NULL_CAPTION)
    name = LAYOUT_NAMES[layout]
    if layout != "stdit" and is_sigma(checkpoint):
        name = name.replace("PixArt-alpha", "PixArt-Sigma")
    lines = [
        str(checkpoint.path),
        f"layout        {name}{entry}{beside}",
        f"parameters    {parameters:,} in {len(tensors.keys() - {NULL_CAPTION})} tensors",
        f"dtype         {', '.join(f'{name} ({count})' for name, count in dtypes.most_common())}",
    ]
    if layout == "latte-diffusers":
        return lines
    found = infer_sizes(tensors)
    width = found["hidden_size"]
    scales: dict[str, float] = {
        key: checkpoint.config[key] for key in ("space_scale", "time_scale") if key in checkpoint.config
    }
    scales |= position_scales(checkpoint.tensors)[0]
    heads, rest = divmod(width, PUBLISHED_HEAD_WIDTH)
    told = checkpoint.config.get("num_attention_heads", checkpoint.config.get("num_heads"))
    guess = f"{heads} if published" if not rest else "give num_heads"
    null_caption = f"{found['model_max_length']} tokens" if NULL_CAPTION in tensors else "none in this layout"
    lines += [
        f"sizes         depth {found['depth']}, width {width}, patch {'x'.join(map(str, found['patch_size']))}, "
        f"{found['in_channels']} latent channels, MLP ratio {found['mlp_ratio']:g}, "
        f"captions {found['caption_channels']} wide, {'with' if found['learn_sigma'] else 'without'} learned variance",
        f"heads         {told or f'not in the file: {guess}'}",
        f"null caption  {null_caption}",
        f"positions     {', '.join(f'{name} {value:g}' for name, value in scales.items()) or 'not in the file'}",
    ]
    extra = [name for name in checkpoint.tensors if expected_unused(name)]
    if extra:
        lines.append(f"not used      {few(extra)}")
    for variant in VARIANTS:
        allowances = () if layout == "stdit" else from_images(layout, variant)
        result = fit(STDiT.parameter_shapes(**{**found, "variant": variant, "num_heads": 1}), tensors, *allowances)
        if result.complaints:
            text = f"does not fit: {result.complaints}"
        else:
            text = "every tensor fits"
            text += f"; {len(result.new)} are new ({few(result.new)})" if result.new else ""
            text += f"; {len(result.unused)} are not used ({few(result.unused)})" if result.unused else ""
        lines.append(f"as {variant:<11}{text}")
    return lines
