"""Open the videos of a run and derive the batch sizes of its loader."""

from typing import Any

from stdit_data.buckets import parse_bucket
from stdit_data.datasets.videos import VideoDataset, open_videos
from stdit_train.config.batches import own_shape, step_batches
from stdit_train.config.schema import DataConfig, TrainConfig
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError


def open_clips(data: DataConfig, world: World | None = None, *, uint8: bool = False) -> VideoDataset:
    """Open the videos of `data.source`, a folder or a manifest.

    Args:
        data: settings.
        world: processes that open them, all of them; rank 0 probes for all. [default: this one]
        uint8: leave pixels as uint8.

    Raises:
        DataError: it does not exist or has no usable video.
        ConfigError: settings contradict each other.
    """
    if data.cache_latents and data.buckets:
        raise ConfigError("data.cache_latents keeps latents of one size: leave data.buckets out, or it")
    return open_videos(
        data.source,
        frames=data.frames,
        height=data.height,
        width=data.width,
        interval=data.interval if data.target_fps is None else None,
        fps=data.target_fps,
        short=data.short,
        crop=data.crop,
        flip=data.flip,
        place=data.place,
        buckets=[parse_bucket(text) for text in data.buckets] or None,
        stream=data.stream,
        root=data.root,
        confine=data.confine,
        empty_captions=data.empty_captions,
        uint8=uint8,
        once=(world or World()).broadcast_from_main,
    )


def loader_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of a `ClipLoader` that set batch sizes and the share of rejected clips.

    With buckets, a step takes clips of one bucket, see `step_batches`. A micro-batch has at most as many tokens as
    `micro_batch` clips of the run's own shape.
    """
    data, settings = config.data, {"max_reject_share": config.data.max_reject_share}
    if not data.buckets:
        return {**settings, "global_batch": config.global_batch, "micro_batch": config.micro_batch}
    sizes = step_batches(config)
    if config.micro_batch is None:
        return {**settings, "global_batch": sizes, "micro_batch": None}
    tokens = config.micro_batch * own_shape(data).tokens()
    micro = {bucket: max(1, tokens // bucket.tokens()) for bucket in sizes}
    return {**settings, "global_batch": sizes, "micro_batch": micro}
