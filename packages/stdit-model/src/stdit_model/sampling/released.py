"""A whole pipeline around bare weights, as Open-Sora and PixArt released them: one .pth and nothing beside it."""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stdit_model.convert import read
from stdit_model.errors import WeightsError
from stdit_model.model import STDiT
from stdit_model.sampling.components import load_part, require
from stdit_model.sampling.folder import T5, VAE, clip_size
from stdit_model.sampling.schedulers import flow_scheduler, iddpm_scheduler
from stdit_model.text import encode_captions
from stdit_model.video_vae import spatial_stride
from stdit_model.weights.files import open_checkpoint
from stdit_model.weights.hub import local_path
from stdit_model.weights.layouts import recognise

if TYPE_CHECKING:
    from stdit_model.sampling.pipeline import STDiTPipeline

PIXART_GUIDANCE = 4.5  # PixArt-alpha's own default
TEXT_TOKENS = 120  # of every published one


def assemble(
    cls: "type[STDiTPipeline]",
    path_or_hub_id: str | Path,
    *,
    vae: Any = VAE,
    text_encoder: Any = T5,
    tokenizer: Any = None,
    scheduler: Any = None,
    dtype: torch.dtype = torch.float32,
    text_encoder_options: dict[str, Any] | None = None,
    num_heads: int | None = None,
    ema: bool = False,
    null_caption: Tensor | None = None,
    **overrides: Any,
) -> "STDiTPipeline":
    """A pipeline from weights of any layout that `stdit_model.convert.read` reads.

    Frames and size are those of the file's position buffers. PixArt's are of single images.

    Args:
        path_or_hub_id: the file, or "owner/name/FILE.pth" on the Hub.
        vae, text_encoder, tokenizer: each a folder, a Hub id, or the loaded part; by default what Open-Sora 1.0 was
            trained with, and the text encoder's own tokenizer. `text_encoder=None` leaves it out.
        scheduler: a loaded one; by default iDDPM for a model that predicts its variance, rectified flow for others.
        dtype: of all weights.
        text_encoder_options: of its from_pretrained, such as quantization_config.
        num_heads, ema, null_caption, overrides: as in `stdit_model.convert.read`.

    Raises:
        FileNotFoundError: nothing is there.
        WeightsError: the file can't be read, or parts are missing: all of them are named, before anything is loaded.
    """
    path = local_path(path_or_hub_id)
    tokenizer = tokenizer or (text_encoder if _is_source(text_encoder) else T5)
    sources = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
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
    if null_caption is None and parts["text_encoder"] is not None and _lacks_null_caption(path):
        null_caption = encode_captions(parts["tokenizer"], parts["text_encoder"], [""], TEXT_TOKENS)[0][0].float()
    transformer, found = read(path, num_heads, ema=ema, null_caption=null_caption, **overrides)
    nn.Module.to(transformer, dtype)  # diffusers' own warns of what it would keep in float32, which is nothing
    nn.Module.to(parts["vae"], dtype)
    _check_widths(path, transformer, parts["vae"], parts["text_encoder"])
    if scheduler is None:
        scheduler = iddpm_scheduler() if transformer.config.learn_sigma else flow_scheduler()
    clip: dict[str, Any] = dict(clip_size(transformer, found))
    if not clip:
        clip = _image_size(path, transformer, spatial_stride(parts["vae"]))
    return cls(transformer, scheduler=scheduler, **parts, **clip)


def _is_source(part: Any) -> bool:
    return isinstance(part, str | Path)


def _lacks_null_caption(path: Path) -> bool:
    """diffusers' layout of PixArt has none: the empty prompt stands in for it there."""
    return recognise(open_checkpoint(path)) == "pixart-diffusers"


def _image_size(path: Path, transformer: STDiT, stride: int) -> dict[str, Any]:
    """The image that a PixArt checkpoint was trained on; nothing for a video model whose file does not tell."""
    checkpoint = open_checkpoint(path)
    if recognise(checkpoint) == "stdit":
        warnings.warn(f"{path}: has no position buffers that tell its clip size: 16x256x256 is taken", stacklevel=4)
        return {}
    side = checkpoint.config.get("sample_size")
    if side is None and "pos_embed" in checkpoint.tensors:
        side = math.isqrt(checkpoint.tensors["pos_embed"].shape[-2]) * transformer.config.patch_size[1]
    side = 64 if side is None else side  # latents: 512 pixels
    return {"num_frames": 1, "height": side * stride, "width": side * stride, "guidance_scale": PIXART_GUIDANCE}


def _check_widths(path: Path, transformer: STDiT, vae: Any, text_encoder: Any) -> None:
    """That VAE and text encoder are of the kind that the transformer was trained with."""
    channels, width = transformer.config.in_channels, transformer.config.caption_channels
    if vae.config.latent_channels != channels:
        raise WeightsError(
            f"{path}: reads {channels} latent channels, this VAE has {vae.config.latent_channels}: give the one it was "
            f"trained with by --vae ({VAE})"
        )
    if text_encoder is not None and text_encoder.config.d_model != width:
        raise WeightsError(
            f"{path}: reads captions {width} wide, this text encoder gives {text_encoder.config.d_model}: give the one "
            f"it was trained with by --text-encoder ({T5})"
        )
