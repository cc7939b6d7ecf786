"""Open the data sets that a run's settings name."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.clip import ClipDataset
from stdit_data.datasets.noisy_captions import NoisyCaptions
from stdit_data.datasets.shapes import ShapesDataset, triples
from stdit_data.latents.memory import InMemoryLatents
from stdit_data.storage import stores
from stdit_model import video_vae
from stdit_train.config.resolve import is_cached
from stdit_train.config.schema import SAMPLED_PROMPTS, TrainConfig
from stdit_train.data.cached import cached_prompts, is_of_shapes, open_cached, validation_of_shapes
from stdit_train.data.holdout import ValidationClips, train_val_split
from stdit_train.data.videos import open_clips
from stdit_train.distributed.world import World


def build_datasets(
    config: TrainConfig, world: World | None = None
) -> tuple[ClipDataset, ShapesDataset | ValidationClips | None, list[str]]:
    """Open the clips to train on, the clips to validate on (None for none), and choose the prompts to sample.

    Args:
        config: the run's settings.
        world: processes that open them, all of them; rank 0 decides what a file's failure could change, such as the
            buckets of clips, for all. [default: this one]

    Raises:
        ConfigError: settings that do not fit the clips.
        DataError: the clips do not exist or cannot be used.
    """
    data = config.data
    stores.set_patience(data.patience)
    if is_cached(config):
        cached = open_cached(config)
        if is_of_shapes(cached):
            return cached, validation_of_shapes(config), cached_prompts(cached, SAMPLED_PROMPTS)
        encoded, held = train_val_split(cached, data, world)
        return encoded, held, cached_prompts(encoded, SAMPLED_PROMPTS)
    if data.source == "shapes":
        size: dict[str, Any] = {"frames": data.frames, "height": data.height, "width": data.width, "fps": data.fps}
        varied: dict[str, Any] = {"spread": data.spread, "later": data.later, "single_frames": data.single_frames}
        clips = ShapesDataset(length=data.clips, seed=config.seed, **varied, **size)
        train = NoisyCaptions(clips, data.caption_noise, config.seed) if data.caption_noise else clips
        validation = ShapesDataset(split="val", length=64, spread=data.spread, **size)
        seen, held_out = triples("train"), triples("heldout")
        shown = [seen[0], seen[100], held_out[5], held_out[17]]
        return train, validation, [triple.captions()[0] for triple in shown]
    videos, held = train_val_split(open_clips(data, world, uint8=True), data, world)
    captions = list(islice((entry.caption for entry in videos.entries if entry.caption), SAMPLED_PROMPTS))
    return videos, held, captions or [""]


def cached_in_memory(dataset: ClipDataset, vae: Any, device: torch.device) -> ClipDataset:
    """Wrap a data set so that each clip is encoded once and its latents are kept in memory.

    Args:
        dataset: clips; one that yields latents already, a cache for instance, is returned as it is.
        vae: encodes them.
        device: where the VAE is.
    """
    if getattr(dataset, "moments", False):
        return dataset

    def encode(video: Tensor) -> Tensor:
        return video_vae.encode_moments(vae, video.to(device)).cpu()

    def shape(clip: Bucket) -> Bucket:
        return Bucket(*video_vae.latent_shape(vae, *clip)[1:])

    return InMemoryLatents(dataset, encode, shape)
