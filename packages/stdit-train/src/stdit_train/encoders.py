"""VAE and text encoder as the functions that `stdit_data.latents.encode` takes; loading them where memory is short."""

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.latents.encode import TextEncoder, VideoEncoder
from stdit_model import video_vae
from stdit_model.text import clean_caption, encode_captions
from stdit_train.components.identity import text_encoder_hash, vae_hash
from stdit_train.components.load import load_text_encoder, load_vae
from stdit_train.config.load import ConfigError

TextLoading = Literal["plain", "8bit", "offload"]
SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def open_video_encoder(source: str, name: str, device: torch.device, *, chunk: int, tiling: bool) -> VideoEncoder:
    """A VAE in float32.

    Args:
        source: pipeline folder, model folder or hub id.
        name: what the cache calls it, and what a training run loads unless it names another.
        device: where it runs.
        chunk: frames that an image VAE takes at once.
        tiling: encode in tiles, for frames too large for the memory; video VAEs also go through the clip in parts of
            their own. Tiles blend at their edges, so it is not the same to the bit.

    Raises:
        ConfigError: nothing there, or a VAE that can't tile.
    """
    vae = load_vae(source, device)
    if tiling:
        try:
            vae.enable_tiling()
        except (AttributeError, NotImplementedError):
            raise ConfigError(f"{type(vae).__name__} cannot encode in tiles: leave --tiling out") from None

    def encode(video: Tensor) -> Tensor:
        return video_vae.encode_moments(vae, video.to(device), chunk)

    def latent_shape(bucket: Bucket) -> tuple[int, ...]:
        return video_vae.latent_shape(vae, *bucket)

    return VideoEncoder(encode, latent_shape, about_vae(vae, name) | {"tiling": tiling})


def open_text_encoder(
    source: str,
    name: str,
    device: torch.device,
    *,
    max_length: int,
    precision: str,
    loading: TextLoading = "plain",
    memory: str | None = None,
    folder: Path | None = None,
) -> TextEncoder:
    """A T5-style encoder.

    Args:
        source, name, device: as for the VAE.
        max_length: tokens; what is longer is cut off.
        precision: of the run that will train on it: float32 with "fp32", else bfloat16.
        loading: `plain`; `8bit`, weights in 8 bits (needs bitsandbytes); `offload`, layers in main memory and, where
            that is short too, on disk, brought in one after another.
        memory: with `offload`, what it may take of the device that it runs on, as in "6GiB".
        folder: with `offload`, where layers lie on disk.

    Raises:
        ConfigError: nothing there, or a package that is missing.
    """
    tokenizer, encoder = load_text_encoder(source, device, precision, **_options(loading, memory, folder))

    def encode(texts: list[str]) -> list[Tensor]:
        states, mask = encode_captions(tokenizer, encoder, texts, max_length, device)
        return [states[i, : int(mask[i].sum())] for i in range(len(texts))]

    about = about_text_encoder(encoder, name) | {"precision": "8bit" if loading == "8bit" else _precision(precision)}
    return TextEncoder(encode, clean_caption, encoder.config.d_model, max_length, about)


def about_vae(vae: Any, name: str) -> dict[str, Any]:
    """What a cache records of a VAE: class, weights, and the numbers that normalise its latents."""
    scale = {key: vae.config.get(key) for key in SCALE if vae.config.get(key) is not None}
    return {"source": name, "class": type(vae).__name__, "hash": vae_hash(vae), "scale": scale}


def about_text_encoder(encoder: Any, name: str) -> dict[str, Any]:
    """What a cache records of a text encoder: class, weights, width."""
    return {
        "source": name,
        "class": type(encoder).__name__,
        "hash": text_encoder_hash(encoder),
        "width": encoder.config.d_model,
    }


def _precision(precision: str) -> str:
    return "float32" if precision in ("fp32", "fp16") else "bfloat16"


def _options(loading: TextLoading, memory: str | None, folder: Path | None) -> dict[str, Any]:
    """What transformers' `from_pretrained` takes for it."""
    if loading == "plain":
        return {}
    if loading == "8bit":
        from importlib.util import find_spec

        if find_spec("bitsandbytes") is None:
            raise ConfigError("--text-loading 8bit needs bitsandbytes: pip install bitsandbytes, or take offload")
        logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # else a line for every layer: what it casts
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "auto"}
    limits: dict[str, Any] = {}
    if memory is not None:
        limits = {"max_memory": {0: memory} if torch.cuda.is_available() else {"cpu": memory}}
    if folder is not None:
        limits["offload_folder"] = str(folder)
    return {"device_map": "auto", **limits}
