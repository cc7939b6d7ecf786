"""Main memory of a run: clips in use and read ahead, states of captions, the copy that a checkpoint is written from."""

import math
from collections.abc import Mapping
from typing import Any

from stdit_data.buckets import Bucket
from stdit_train.assets import DEMO
from stdit_train.components.captions import MEMORY
from stdit_train.components.sizes import vae_channels, vae_frames, vae_stride
from stdit_train.config.batches import own_shape, step_batches
from stdit_train.config.schema import TrainConfig


def host_memory(
    config: TrainConfig,
    vae: Mapping[str, Any],
    *,
    cached: bool,
    cached_texts: bool,
    text_states: int,
    micro_batch: int,
    ranks: int,
    shards: int,
) -> dict[str, int]:
    """Return the bytes of main memory that a process takes besides Python and its libraries, by what they are for.

    Args:
        config: of the run.
        vae: arguments of AutoencoderKL.
        cached: whether clips come from a cache, as latents.
        cached_texts: whether the states of captions come with them.
        text_states: bytes of a caption's states.
        micro_batch: samples at once.
        ranks: data-parallel ranks that share a step.
        shards: bytes of this process's weights, average and optimizer state, which a checkpoint has.
    """
    data = config.data
    steps = {
        bucket: _step_bytes(config, vae, bucket, cached, clips // ranks, micro_batch, text_states * cached_texts)
        for bucket, clips in step_batches(config).items()
    }
    step = max(steps.values())
    clips, own = data.clips, own_shape(data)
    states = _remembered(clips * text_states if _is_drawn(config) else MEMORY)
    memory = {
        # the step in use and the one before it, for a moment; and what is read ahead, unless it is encoded on first use
        "clips": 2 * step + (0 if data.cache_latents else max(step, data.prefetch_bytes)),
        "latents that are kept": clips * 2 * 2 * _latent_elements(vae, own) if data.cache_latents else 0,
        "text states, at most": 0 if cached_texts else states,
        "copy for a checkpoint": 0 if config.checkpoint_async is False else shards,
    }
    return {name: size for name, size in memory.items() if size}


def _step_bytes(
    config: TrainConfig, vae: Mapping[str, Any], bucket: Bucket, cached: bool, clips: int, micro: int, text_states: int
) -> int:
    """Return the bytes of one step's clips of a bucket, and of their random numbers, on one data-parallel rank."""
    data, pixels, latent = config.data, 3 * math.prod(bucket), _latent_elements(vae, bucket)
    if cached:
        video = 2 * 2 * latent  # moments in bfloat16
    elif data.cache_latents:
        video = 4 * 2 * latent
    else:
        video = pixels * (4 if _is_drawn(config) else 1)  # videos are uint8
    micro = max(1, min(clips, micro * own_shape(data).tokens() // bucket.tokens()))
    drawn = 2 * _pinned(micro * 4 * latent) if config.draw == "philox" else 0
    return -(-clips // micro) * (_pinned(micro * video) + drawn + micro * text_states)


def _is_drawn(config: TrainConfig) -> bool:
    """Return whether clips are drawn, in float32. A stage as published names no data: it is one of videos."""
    return config.data.source == "shapes" and config.data.vae == DEMO


def _latent_elements(vae: Mapping[str, Any], bucket: Bucket) -> int:
    frames = vae_frames(vae, bucket.frames)
    stride = vae_stride(vae)
    return vae_channels(vae) * frames * (bucket.height // stride) * (bucket.width // stride)


def _pinned(size: int) -> int:
    """Return the bytes of a tensor in pinned memory, which torch allocates in powers of two."""
    return 1 << max(0, size - 1).bit_length()


def _remembered(size: int) -> int:
    """Return the bytes of remembered states: all, or none where they do not fit."""
    return size if size <= MEMORY else 0
