"""Recognise the layout of a checkpoint and map its names to STDiT's.

    stdit             the names of the Open-Sora v1.0 release, which this package keeps
    pixart            PixArt-alpha's release: the same names for images (a 4-D patch kernel, no temporal attention)
    pixart-diffusers  diffusers' PixArtTransformer2DModel
    latte-diffusers   diffusers' LatteTransformer3DModel: recognised, but not read

The layout is recognised by the names and shapes of the tensors.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from stdit_model.embed import spatial_positions, temporal_positions
from stdit_model.errors import WeightsError, few
from stdit_model.weights.files import Checkpoint, PackedTensor, StoredTensor
from stdit_model.weights.folders import read_json

Layout = Literal["stdit", "pixart", "pixart-diffusers", "latte-diffusers"]
LAYOUT_NAMES: dict[Layout, str] = {
    "stdit": "STDiT (the names of Open-Sora v1.0)",
    "pixart": "PixArt-alpha, original release",
    "pixart-diffusers": "PixArt-alpha, diffusers' PixArtTransformer2DModel",
    "latte-diffusers": "Latte, diffusers' LatteTransformer3DModel (not readable here)",
}

# Models that are taken for an STDiT, by the beginning of a name that only they have.
OTHER_MODELS = {
    "t_block_temp.": "STDiT2 (Open-Sora 1.1)",
    "spatial_blocks.": "STDiT3 (Open-Sora 1.2 and 1.3)",
    "y_embedder.embedding_table.": "DiT or Latte for classes",
    "temp_embed": "Latte, original release",
    "double_blocks.": "a double-stream model (Flux, HunyuanVideo or Open-Sora 2.0)",
    "joint_blocks.": "an MMDiT (Stable Diffusion 3)",
}

SIGMA_TOKENS = 300  # of PixArt-Sigma's captions; PixArt-alpha's have 120

# Computed in forward for each size, so never read.
POSITIONS = ("pos_embed", "pos_embed_temporal", "pos_embed.pos_embed")
# Embedders of an image's size and aspect ratio, which only PixArt's 1024-MS models have.
MICRO_CONDITIONS = re.compile(r"(csize_embedder|ar_embedder|adaln_single\.emb\.(resolution|aspect_ratio)_embedder)\..+")


def recognise(checkpoint: Checkpoint) -> Layout:
    """Return the layout of a checkpoint.

    Raises:
        WeightsError: it has none of the known layouts.
    """
    tensors = checkpoint.tensors
    other = next((name for mark, name in OTHER_MODELS.items() if any(key.startswith(mark) for key in tensors)), None)
    if other is not None:
        raise WeightsError(f"{checkpoint.path}: the weights of {other}, which is another architecture than STDiT")
    if "adaln_single.linear.weight" in tensors:
        temporal = any(name.startswith("temporal_transformer_blocks.") for name in tensors)
        return "latte-diffusers" if temporal else "pixart-diffusers"
    patch = tensors.get("x_embedder.proj.weight")
    if patch is None or not any(name.startswith("blocks.0.") for name in tensors):
        raise WeightsError(
            f"{checkpoint.path}: none of the known layouts (STDiT or Open-Sora v1.0, PixArt-alpha); its keys are "
            f"{few(sorted(tensors))}"
        )
    return "pixart" if len(patch.shape) == 4 else "stdit"


def is_sigma(checkpoint: Checkpoint) -> bool:
    """Whether a PixArt checkpoint is of PixArt-Sigma (arXiv:2403.04692), which has SDXL's VAE and longer captions.

    The tensors are those of PixArt-alpha but for the null caption. diffusers' layout has none: there the pipeline
    tells, or that a model for 1024 pixels or more has no micro-conditions. A folder of the transformer alone for
    smaller images is taken for PixArt-alpha.
    """
    null_caption = checkpoint.tensors.get("y_embedder.y_embedding")
    if null_caption is not None:
        return null_caption.shape[0] == SIGMA_TOKENS
    index = checkpoint.path.parent.parent / "model_index.json"
    if checkpoint.path.parent.name == "transformer" and index.is_file():
        return "Sigma" in str(read_json(index).get("_class_name"))
    large = (checkpoint.config.get("sample_size") or 0) >= 128
    return large and checkpoint.config.get("use_additional_conditions") is False


def expected_unused(name: str) -> bool:
    """Whether a file may hold this tensor although STDiT has no use for it: positions and micro-conditions."""
    return name in POSITIONS or MICRO_CONDITIONS.fullmatch(name) is not None


def stdit_items(tensors: Mapping[str, Tensor], layout: Layout) -> Iterator[tuple[str, StoredTensor]]:
    """Yield a file's tensors under STDiT's names.

    Tensors that are expected to be unused are left out; unknown names pass through unchanged.
    """
    if layout == "pixart-diffusers":
        yield from _from_diffusers(tensors)
        return
    for name, tensor in tensors.items():
        if expected_unused(name):
            continue
        if layout == "pixart" and name == "x_embedder.proj.weight":
            tensor = tensor.unsqueeze(2)  # a patch of one frame
        yield name, tensor


_DIFFUSERS = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "proj_out": "final_layer.linear",
}
_DIFFUSERS_BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_DIFFUSERS_PACKED = {
    source: (target, sources)
    for target, sources in (
        ("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
    )
    for source in sources
}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+?)\.(weight|bias)")


def _from_diffusers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Map PixArtTransformer2DModel's names; q, k, v of self- and k, v of cross-attention are packed into one each."""
    taken: set[str] = set()
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        block = _BLOCK.fullmatch(name)
        if expected_unused(name) or name in taken:
            continue
        if module in _DIFFUSERS:
            yield f"{_DIFFUSERS[module]}.{kind}", tensor.unsqueeze(2) if len(tensor.shape) == 4 else tensor
        elif name == "scale_shift_table":
            yield "final_layer.scale_shift_table", tensor
        elif module.startswith("transformer_blocks.") and kind == "scale_shift_table":
            yield f"blocks.{module.removeprefix('transformer_blocks.')}.scale_shift_table", tensor
        elif block and block[2] in _DIFFUSERS_BLOCK:
            yield f"blocks.{block[1]}.{_DIFFUSERS_BLOCK[block[2]]}.{block[3]}", tensor
        elif block and block[2] in _DIFFUSERS_PACKED:
            target, sources = _DIFFUSERS_PACKED[block[2]]
            parts = [f"transformer_blocks.{block[1]}.{source}.{block[3]}" for source in sources]
            present = [part for part in parts if part in tensors]
            taken.update(present)
            # If some of q, k, v are missing, the packed tensor is too small, and the strict check names it.
            yield f"blocks.{block[1]}.{target}.{block[3]}", PackedTensor(tuple(tensors[part] for part in present))
        else:
            yield name, tensor


def infer_sizes(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Infer STDiT's constructor arguments from the shapes of its tensors.

    The number of heads cannot be inferred, model_max_length only where there is a null caption. The variants "seq"
    and "parallel" have the same tensors: "seq" is returned for both.

    Raises:
        WeightsError: tensors that the sizes are read from are missing or have other shapes.
    """
    needed = {
        "x_embedder.proj.weight": 5,
        "blocks.0.mlp.fc1.weight": 2,
        "y_embedder.y_proj.fc1.weight": 2,
        "final_layer.linear.weight": 2,
    }
    wrong = [name for name, ndim in needed.items() if name not in tensors or len(tensors[name].shape) != ndim]
    if wrong:
        raise WeightsError(f"cannot infer the model's sizes: tensors missing or of another shape: {few(wrong)}")
    width, in_channels, *patch = tensors["x_embedder.proj.weight"].shape
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    ratio = hidden / width
    out_channels, rest = divmod(tensors["final_layer.linear.weight"].shape[0], math.prod(patch))
    if rest or out_channels not in (in_channels, 2 * in_channels):
        raise WeightsError(
            f"final_layer.linear.weight gives {out_channels} channels; expected {in_channels}, or {2 * in_channels} "
            "with the variance"
        )
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    if blocks != set(range(len(blocks))):
        raise WeightsError(f"only {len(blocks)} of the blocks blocks.0 to blocks.{max(blocks)} are in the file")
    spatial = {i for i in blocks if f"blocks.{i}.attn.qkv.weight" in tensors}
    temporal = {i for i in blocks if f"blocks.{i}.attn_temp.qkv.weight" in tensors}
    variant = "seq" if spatial & temporal else "latte" if temporal else "dit"
    found = {
        "variant": variant,
        "depth": len(blocks),
        "hidden_size": width,
        "patch_size": tuple(patch),
        "in_channels": in_channels,
        "learn_sigma": out_channels != in_channels,
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "caption_channels": tensors["y_embedder.y_proj.fc1.weight"].shape[1],
    }
    if "y_embedder.y_embedding" in tensors:
        found["model_max_length"] = tensors["y_embedder.y_embedding"].shape[0]
    return found


def position_scales(tensors: Mapping[str, Tensor]) -> tuple[dict[str, float], tuple[int, int, int] | None]:
    """Infer space_scale and time_scale, and the grid (T, H, W), from a file's position buffers.

    The scale follows from the lowest frequency at the second position; it is accepted if it reproduces the whole
    table. The grid is None without a temporal table, as in image models, or without a spatial one that is reproduced.
    """
    scales: dict[str, float] = {}
    grid, frames = None, None
    if "pos_embed" in tensors:
        table = tensors["pos_embed"].flatten(0, -2)  # [1, P, D] -> [P, D]
        tokens, width = table.shape
        shapes = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
        shapes.sort(key=lambda shape: abs(shape[0] - shape[1]))  # a square, if it can be one
        for scale, shape in itertools.product(_scales(table[:, : width // 2]), shapes):
            if _same(table, spatial_positions(width, *shape, scale)):
                scales["space_scale"], grid = scale, shape
                break
    if "pos_embed_temporal" in tensors:
        table = tensors["pos_embed_temporal"].flatten(0, -2)
        frames, width = table.shape
        for scale in _scales(table):
            if _same(table, temporal_positions(width, frames, scale)):
                scales["time_scale"] = scale
                break
    return scales, None if grid is None or frames is None else (frames, *grid)


def _scales(table: Tensor) -> list[float]:
    """Candidate scales of a 1-D [sin | cos] table from its second row: the nearest simple fraction, and as measured."""
    half = table.shape[1] // 2
    if len(table) < 2 or half < 1:
        return []
    sine, cosine = table[1, half - 1].double().item(), table[1, -1].double().item()
    position = math.atan2(sine, cosine) * 10000.0 ** ((half - 1) / half)
    if not 1e-3 < position < 1e3:
        return []
    simple = float(Fraction(1 / position).limit_denominator(64))
    near = abs(simple * position - 1) < max(1e-6, 20 * torch.finfo(table.dtype).eps)
    return [simple, 1 / position] if near else [1 / position]


def _same(table: Tensor, ours: Tensor) -> bool:
    """Whether a position table equals ours to the precision of its dtype."""
    tolerance = max(1e-3, 4 * torch.finfo(table.dtype).eps)
    return table.shape == ours.shape and (table.float() - ours).abs().max().item() < tolerance
