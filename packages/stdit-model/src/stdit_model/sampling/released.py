"""The components of a pipeline around bare weights, as Open-Sora and PixArt released them: a single .pth."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stdit_model.convert import find
from stdit_model.errors import WeightsError
from stdit_model.model import STDiT
from stdit_model.protocols import VAE, Scheduler, TextEncoder, Tokenizer
from stdit_model.sampling.components import load_part, own_parts, require
from stdit_model.sampling.folder import T5_ID, clip_size, default_negative_prompt, vae_id
from stdit_model.sampling.schedulers import flow_scheduler, iddpm_scheduler
from stdit_model.video_vae import latent_channels, spatial_stride
from stdit_model.weights.files import open_checkpoint
from stdit_model.weights.hub import local_path
from stdit_model.weights.layouts import recognise
from stdit_model.weights.load import Weights, build

PIXART_GUIDANCE, PIXART_STEPS = 4.5, 20  # defaults of diffusers' PixArtAlphaPipeline, the latter for its own scheduler
OWN = "own"


def released_components(
    path_or_hub_id: str | Path,
    *,
    vae: VAE | str | Path | None = None,
    text_encoder: TextEncoder | str | Path | None = OWN,
    tokenizer: Tokenizer | str | Path | None = None,
    scheduler: Scheduler | None = None,
    dtype: torch.dtype = torch.float32,
    text_encoder_options: dict[str, Any] | None = None,
    num_heads: int | None = None,
    ema: bool = False,
    null_caption: Tensor | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Load weights of any layout that `stdit_model.convert.read` reads, and the components that they need.

    The clip size is that of the file's position buffers, a single image for PixArt.

    Args:
        path_or_hub_id: the file, or "owner/name/FILE.pth" on the Hub; or a pipeline's folder or Hub id.
        vae, text_encoder, tokenizer: each a folder, a Hub id, or the loaded component; by default the pipeline's own,
            or for weights alone those that Open-Sora 1.0 was trained with, and the text encoder's own tokenizer.
            `text_encoder=None` leaves it out.
        scheduler: by default the pipeline's own, or for weights alone iDDPM for a model that predicts its variance,
            rectified flow for others.
        dtype: of all weights.
        text_encoder_options: of its from_pretrained, such as quantization_config.
        num_heads, ema, null_caption, overrides: as in `stdit_model.convert.read`.

    Returns:
        The arguments of `STDiTPipeline`.

    Raises:
        WeightsFileNotFoundError: no such file.
        WeightsError: the file cannot be read; or components are missing, all of which are named before any is loaded.
    """
    own = own_parts(path_or_hub_id)
    path = local_path(path_or_hub_id)
    # A file of another kind is refused before the Hub is asked.
    found = find(path, num_heads, ema=ema, null_caption=null_caption, **overrides)
    if vae is None:
        vae = own.get("vae", vae_id(found))
    if tokenizer is None:
        tokenizer = own.get("tokenizer", own.get("text_encoder", T5_ID))
        if isinstance(text_encoder, str | Path) and text_encoder != OWN:
            tokenizer = text_encoder
    if text_encoder == OWN:
        text_encoder = own.get("text_encoder", T5_ID)
    sources: dict[str, Any] = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    require({part: source for part, source in sources.items() if _is_source(source)})
    options: dict[str, dict[str, Any]] = {
        "vae": {},
        "text_encoder": {"dtype": dtype, **(text_encoder_options or {})},
        "tokenizer": {},
    }
    parts = {
        part: load_part(part, source, **options[part]) if _is_source(source) else source
        for part, source in sources.items()
    }
    transformer = build(STDiT, found, dtype=None)
    nn.Module.to(transformer, dtype)  # diffusers' own `to` warns about modules kept in float32, of which there are none
    nn.Module.to(parts["vae"], dtype)
    _check_widths(path, transformer, parts["vae"], parts["text_encoder"], vae_id(found))
    if scheduler is None and "scheduler" in own:
        scheduler = load_part("scheduler", own["scheduler"])
    elif scheduler is None:
        scheduler = iddpm_scheduler() if transformer.config.learn_sigma else flow_scheduler()
    clip: dict[str, Any] = dict(clip_size(transformer, found))
    if not clip:
        clip = _image_size(path, transformer, spatial_stride(parts["vae"]))
    if clip.get("num_frames") == 1 and "scheduler" in own:
        clip["num_inference_steps"] = PIXART_STEPS
    clip |= default_negative_prompt(found)
    return {"transformer": transformer, "scheduler": scheduler, **parts, **clip}


def trained_frames(found: Weights) -> int:
    """Return the frames per clip that weights were trained on, by their position buffers; 1 for PixArt's images."""
    if found.grid is not None:
        return found.grid[0] * int(found.config["patch_size"][0])
    return 16 if recognise(open_checkpoint(found.path)) == "stdit" else 1


def _is_source(part: Any) -> bool:
    return isinstance(part, str | Path)


def _image_size(path: Path, transformer: STDiT, stride: int) -> dict[str, Any]:
    """The image size that a PixArt checkpoint was trained on; nothing for a video model."""
    checkpoint = open_checkpoint(path)
    if recognise(checkpoint) == "stdit":
        warnings.warn(f"{path}: has no position buffers to infer the clip size from; using 16x256x256", stacklevel=4)
        return {}
    side = checkpoint.config.get("sample_size")
    if side is None and "pos_embed" in checkpoint.tensors:
        side = math.isqrt(checkpoint.tensors["pos_embed"].shape[-2]) * transformer.config.patch_size[1]
    side = 64 if side is None else side  # latents: 512 pixels
    return {"num_frames": 1, "height": side * stride, "width": side * stride, "guidance_scale": PIXART_GUIDANCE}


def _check_widths(path: Path, transformer: STDiT, vae: VAE, text_encoder: TextEncoder | None, own: str) -> None:
    """Check that VAE and text encoder have the widths that the transformer was trained with."""
    channels, width = transformer.config.in_channels, transformer.config.caption_channels
    if latent_channels(vae) != channels:
        raise WeightsError(
            f"{path}: takes {channels} latent channels, this VAE has {latent_channels(vae)}: pass the one that "
            f"it was trained with, `vae={own}`"
        )
    if text_encoder is not None and text_encoder.config.d_model != width:
        raise WeightsError(
            f"{path}: takes captions {width} wide, this text encoder's are {text_encoder.config.d_model}: pass the one "
            f"that it was trained with, `text_encoder={T5_ID}`"
        )
