"""Makes a cache of what a stage trains on, and looks into one: datasets, VAE and text encoder brought together."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit_data.latents.dataset import LatentDataset
from stdit_data.latents.encode import SHARD_BYTES, Job, manifest_about, text_job, video_job
from stdit_data.latents.format import Part, is_cache
from stdit_model import video_vae
from stdit_train.build import build_datasets
from stdit_train.components.load import load_vae
from stdit_train.config.load import ConfigError, TrainConfig
from stdit_train.device import find_device
from stdit_train.encoders import TextLoading, open_text_encoder, open_video_encoder

# Settings of a run that its clips depend on.
TRANSFORM = ("frames", "height", "width", "interval", "target_fps", "short", "crop", "place", "flip", "stream")


@dataclass(frozen=True)
class Encoding:
    """How a cache is made."""

    out: str
    parts: tuple[Part, ...] = ("video", "text")
    variants: int = 1  # draws of place, crop and mirroring, one after another in the epochs of training
    dtype: str = "bfloat16"  # as stored
    shard_bytes: int = SHARD_BYTES
    chunk: int = 16  # frames that an image VAE takes at once
    tiling: bool = False
    text_batch: int = 16
    text_loading: TextLoading = "plain"
    text_memory: str | None = None
    offload_folder: Path | None = None


@dataclass(frozen=True)
class Process:
    """This process among those that share the work, as torchrun numbers them."""

    rank: int = 0
    world: int = 1
    local: int = 0  # which GPU


def this_process() -> Process:
    """From RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; alone without them.

    Raises:
        ConfigError: they are no numbers that fit together.
    """
    values = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    if not all(value.isdigit() for value in values) or int(values[0]) >= int(values[1]):
        raise ConfigError(f"RANK is {values[0]!r} and WORLD_SIZE {values[1]!r}: expected a rank below the world's size")
    return Process(int(values[0]), int(values[1]), int(os.environ.get("LOCAL_RANK", "0")))


def open_jobs(config: TrainConfig, names: dict[str, str], encoding: Encoding, process: Process) -> Iterator[Job]:
    """The jobs that encode what a run would train on, one after another: the VAE is gone when T5 is loaded.

    Args:
        config: of the run; its VAE and text encoder are what is loaded.
        names: what the cache calls these, by setting ("vae", "text_encoder").
        encoding: how.
        process: this one.

    Raises:
        ConfigError, DataError: settings, files or components that don't fit, by name.
    """
    data, device = config.data, _device(process)
    if data.source != "shapes" and is_cache(data.source):
        raise ConfigError(f"{data.source} is a cache already: encode clips, or `shapes`")
    everything = replace(data, validation=0.0, validation_source=None)  # a cache is parted when it is trained from
    dataset: Any = build_datasets(replace(config, data=everything))[0]
    manifest = manifest_about(data.source, dataset)
    transform = {name: getattr(data, name) for name in TRANSFORM} | {"buckets": list(data.buckets)}
    share: dict[str, Any] = {
        "dtype": encoding.dtype,
        "shard_bytes": encoding.shard_bytes,
        "rank": process.rank,
        "world": process.world,
    }
    if "video" in encoding.parts:
        vae = open_video_encoder(data.vae, names["vae"], device, chunk=encoding.chunk, tiling=encoding.tiling)
        yield video_job(
            dataset,
            encoding.out,
            vae,
            transform,
            manifest,
            seed=config.seed,
            variants=encoding.variants,
            workers=data.workers,
            max_reject_share=data.max_reject_share,
            **share,
        )
        del vae
    if "text" in encoding.parts:
        text = open_text_encoder(
            data.text_encoder,
            names["text_encoder"],
            device,
            max_length=config.model.model_max_length,
            precision=config.precision,
            loading=encoding.text_loading,
            memory=encoding.text_memory,
            folder=encoding.offload_folder,
        )
        captions = [dataset.caption(index) for index in range(len(dataset))]
        yield text_job(captions, encoding.out, text, manifest, batch=encoding.text_batch, **share)


def decode_entries(cache: str, vae: str, count: int, seed: int) -> tuple[list[Tensor], list[str]]:
    """A few entries of a cache as videos [3, T, H, W] in [-1, 1], and a line about each.

    The posterior's mean is decoded. Which entries is drawn by the seed; clips that could not be read are passed by.
    """
    dataset, device = LatentDataset(cache), find_device()
    model = load_vae(vae, device)
    videos, lines = [], []
    for index in map(int, np.random.default_rng(seed).permutation(len(dataset))):
        entry = dataset.entry(index)
        if entry["key"] is None:
            continue
        clip = dataset.load(index, seed=0, epoch=0)
        latents = video_vae.sample_latents(model, clip.video[None].to(device))
        videos.append(video_vae.decode(model, latents)[0].cpu())
        tokens = "" if clip.text is None else f", {len(clip.text)} tokens"
        source = entry["source"].rsplit("/", 1)[-1] if "://" not in entry["source"] else entry["source"]
        lines.append(f"{index}: {clip.caption} ({source}, {clip.span[0]:.2f} to {clip.span[1]:.2f} s{tokens})")
        if len(videos) == count:
            break
    return videos, lines


def _device(process: Process) -> torch.device:
    device = find_device()
    return torch.device("cuda", process.local) if device.type == "cuda" else device
