"""Encode the clips and captions that a stage trains on into a cache, and decode entries of one."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.latents.dataset import LatentDataset
from stdit_data.latents.encode import TextEncoder, VideoEncoder, manifest_metadata, text_job, video_job
from stdit_data.latents.format import Part, check_place, is_cache
from stdit_data.latents.job import SHARD_BYTES, Job, Place
from stdit_data.storage import stores
from stdit_data.workers.executors import Inline, Processes, worker_device
from stdit_data.workers.work import Share
from stdit_model import video_vae
from stdit_model.text import clean_caption, encode_captions
from stdit_train.components.identity import about_text_encoder, about_vae
from stdit_train.components.load import eight_bit_config, load_text_encoder, load_vae
from stdit_train.components.sizes import check_clips
from stdit_train.config.schema import TrainConfig
from stdit_train.data.datasets import build_datasets
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError
from stdit_train.hardware import find_device

T = TypeVar("T")
TextLoading = Literal["full", "8bit", "offload"]

# Settings of a run that its clips depend on; a cache records them.
TRANSFORM = ("frames", "height", "width", "interval", "target_fps", "short", "crop", "place", "flip", "stream")


@dataclass(frozen=True)
class Encoding:
    """Settings of a cache."""

    out: str
    parts: tuple[Part, ...] = ("video", "text")
    variants: int = 1  # random draws of start, crop and flip per clip; training takes them epoch by epoch
    dtype: str = "bfloat16"  # stored type
    shard_bytes: int = SHARD_BYTES
    chunk: int = 16  # frames that an image VAE takes at once
    tiling: bool = False
    text_batch: int = 16
    text_loading: TextLoading = "full"
    text_memory: str | None = None
    offload_folder: Path | None = None


def open_jobs(
    config: TrainConfig, names: dict[str, str], encoding: Encoding, world: World, place: Place | None = None
) -> Iterator[Job]:
    """Yield the jobs that encode what a run would train on, video before text, with one model loaded at a time.

    Args:
        config: settings of the run, with the VAE and text encoder to load.
        names: what the cache records as their sources, by setting ("vae", "text_encoder").
        encoding: settings of the cache.
        world: the processes that torchrun started, for this one's device.
        place: where the jobs run. [default: in this process, its share of the world's]

    Raises:
        ConfigError: settings contradict each other, or a model cannot be loaded.
        DataError: the clips, or an existing cache, cannot be used.
    """
    data, place = config.data, place or Place(Share(world.rank, world.size))
    if data.source != "shapes" and is_cache(data.source):
        raise ConfigError(f"{data.source} is already a cache: encode clips, or `shapes`")
    check_place(encoding.out)
    everything = replace(data, validation=0.0, validation_source=None)  # a cache is split when it is trained from
    dataset: Any = build_datasets(replace(config, data=everything))[0]
    manifest = manifest_metadata(data.source, dataset)
    common: dict[str, Any] = {"seed": config.seed, "dtype": encoding.dtype, "shard_bytes": encoding.shard_bytes}

    def open_with(opener: Callable[[torch.device], T], place: Place) -> tuple[T, dict[str, Any]]:
        """Load an encoder, and say how other processes load theirs; this one's then only describes it."""
        if not place.executor.separate:
            return opener(world.device()), {"place": place}
        width = place.executor.width if isinstance(place.executor, Processes) else None
        threads = max(1, torch.get_num_threads() // width) if width else None
        load = _InWorker(opener, data.patience, threads, Path.cwd())
        return opener(torch.device("cpu")), {"place": place, "load": load}

    if "video" in encoding.parts:
        settings: dict[str, Any] = {"chunk": encoding.chunk, "tiling": encoding.tiling}
        if not is_cache(encoding.out):
            check_clips(config)
        vae, where = open_with(partial(open_video_encoder, data.vae, names["vae"], **settings), place)
        transform = {name: getattr(data, name) for name in TRANSFORM} | {"buckets": list(data.buckets)}
        reading: dict[str, Any] = {"workers": data.workers, "max_reject_share": data.max_reject_share}
        job = video_job(
            dataset,
            encoding.out,
            vae,
            transform,
            manifest,
            variants=encoding.variants,
            **reading,
            **common,
            **where,
        )
        del vae, where
        yield job
    if "text" in encoding.parts:
        options: dict[str, Any] = {
            "max_length": config.model.model_max_length,
            "precision": config.precision,
            "loading": encoding.text_loading,
            "memory": encoding.text_memory,
            "folder": encoding.offload_folder,
        }
        if encoding.text_loading != "full":  # it takes all GPUs, or none
            place = replace(place, executor=Inline())
        text, where = open_with(partial(open_text_encoder, data.text_encoder, names["text_encoder"], **options), place)
        captions = [dataset.caption(index) for index in range(len(dataset))]
        job = text_job(captions, encoding.out, text, manifest, batch=encoding.text_batch, **common, **where)
        del text, where
        yield job


@dataclass(frozen=True)
class _InWorker(Generic[T]):
    """Loads an encoder in a process that encodes: on a device of its own, in the folder that the command runs in."""

    opener: Callable[[torch.device], T]
    patience: float  # minutes, see `stores`
    threads: int | None  # of torch
    folder: Path

    def __call__(self) -> T:
        stores.set_patience(self.patience)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.folder.is_dir():  # a worker of a cluster may run elsewhere
            os.chdir(self.folder)
        return self.opener(torch.device(worker_device()))


def decode_entries(cache: str, vae: str, count: int, seed: int) -> tuple[list[Tensor], list[str]]:
    """Decode random entries of a cache: videos [3, T, H, W] in [-1, 1], and a line about each.

    Args:
        cache: folder or URL of the cache.
        vae: source of its VAE; the mean of the posterior is decoded.
        count: number of entries; those of clips that could not be read are skipped.
        seed: seed of their choice.

    Raises:
        DataError: the cache cannot be read.
        ConfigError: the VAE cannot be loaded.
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


def open_video_encoder(source: str, name: str, device: torch.device, *, chunk: int, tiling: bool) -> VideoEncoder:
    """Load a VAE in float32 as the encoder of a cache.

    Args:
        source: pipeline folder, model folder or Hub id.
        name: source that the cache records, which a training run loads unless it names another.
        device: where it runs.
        chunk: frames that an image VAE encodes at once.
        tiling: encode in tiles, for frames too large for memory; video VAEs also split the clip in time. Tiles are
            blended at their edges, so latents differ slightly.

    Raises:
        ConfigError: the VAE cannot be loaded, or cannot tile.
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
    loading: TextLoading = "full",
    memory: str | None = None,
    folder: Path | None = None,
) -> TextEncoder:
    """Load a T5 encoder as the text encoder of a cache.

    Args:
        source: pipeline folder, model folder or Hub id.
        name: source that the cache records, which a training run loads unless it names another.
        device: where it runs.
        max_length: tokens; longer captions are cut.
        precision: precision of the run that will train on the cache.
        loading: `full` for the whole encoder on the device; `8bit` for weights in 8 bits (needs bitsandbytes);
            `offload` to keep layers in main memory and, if that is full, on disk, and fetch them one by one.
        memory: with `offload`, the memory it may take on its device, for instance "6GiB".
        folder: with `offload`, where layers are kept on disk.

    Raises:
        ConfigError: the encoder cannot be loaded, or a package is missing.
    """
    tokenizer, encoder = load_text_encoder(source, device, precision, **_options(loading, memory, folder))

    def encode(texts: list[str]) -> list[Tensor]:
        states, mask = encode_captions(tokenizer, encoder, texts, max_length, device)
        return [states[i, : int(mask[i].sum())] for i in range(len(texts))]

    about = about_text_encoder(encoder, name) | {"precision": "8bit" if loading == "8bit" else _precision(precision)}
    return TextEncoder(encode, clean_caption, encoder.config.d_model, max_length, about)


def _precision(precision: str) -> str:
    return "float32" if precision in ("fp32", "fp16") else "bfloat16"


def _options(loading: TextLoading, memory: str | None, folder: Path | None) -> dict[str, Any]:
    """Return the arguments of transformers' `from_pretrained` for a way of loading."""
    if loading == "full":
        return {}
    if loading == "8bit":
        return {"quantization_config": eight_bit_config("--text-loading 8bit", "offload"), "device_map": "auto"}
    limits: dict[str, Any] = {}
    if memory is not None:
        limits = {"max_memory": {0: memory} if torch.cuda.is_available() else {"cpu": memory}}
    if folder is not None:
        limits["offload_folder"] = str(folder)
    return {"device_map": "auto", **limits}
