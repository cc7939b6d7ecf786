"""What a checkpoint is: layout, parameters, dtype, sizes, and what it lacks as each variant."""

import math
from collections import Counter
from pathlib import Path

from stdit_model.errors import few
from stdit_model.presets import VARIANTS
from stdit_model.weights.files import open_checkpoint
from stdit_model.weights.hub import local_path
from stdit_model.weights.layouts import LAYOUT_NAMES, expected_unused, position_scales, recognised, sizes, stdit_items
from stdit_model.weights.load import NULL_CAPTION, PUBLISHED_HEAD_WIDTH, from_images
from stdit_model.weights.strict import fit


def describe(path_or_hub_id: str | Path, ema: bool = False) -> list[str]:
    """Lines for a person to read. Tensors stay unread, but for the position buffers.

    Args:
        ema: look at `state_dict_ema` of a PixArt .pth.

    Raises:
        FileNotFoundError: nothing is there.
        WeightsError: not a checkpoint, or of no known layout.
    """
    checkpoint = open_checkpoint(local_path(path_or_hub_id), "state_dict_ema" if ema else None)
    layout = recognised(checkpoint)
    tensors = dict(stdit_items(checkpoint.tensors, layout))
    entry = f", under {checkpoint.entry!r}" if checkpoint.entry else ""
    beside = f" (beside it: {', '.join(checkpoint.beside)})" if checkpoint.beside else ""
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    parameters = sum(math.prod(tensor.shape) for name, tensor in tensors.items() if name != NULL_CAPTION)
    lines = [
        str(checkpoint.path),
        f"layout        {LAYOUT_NAMES[layout]}{entry}{beside}",
        f"parameters    {parameters:,} in {len(tensors.keys() - {NULL_CAPTION})} tensors",
        f"dtype         {', '.join(f'{name} ({count})' for name, count in dtypes.most_common())}",
    ]
    if layout == "latte-diffusers":
        return lines
    found = sizes(tensors)
    width, scales = found["hidden_size"], position_scales(checkpoint.tensors)[0]
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
        result = fit({**found, "variant": variant, "num_heads": 1}, tensors, *allowances)
        if result.complaints:
            text = f"does not fit: {result.complaints}"
        else:
            text = "every tensor fits"
            text += f"; {len(result.new)} are new ({few(result.new)})" if result.new else ""
            text += f"; {len(result.unused)} are not used ({few(result.unused)})" if result.unused else ""
        lines.append(f"as {variant:<11}{text}")
    return lines
