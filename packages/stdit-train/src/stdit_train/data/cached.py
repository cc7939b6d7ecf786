"""Open a cache of latents and text states to train from, and check that it fits the run."""

from itertools import islice

from stdit_data.buckets import Bucket, parse_bucket
from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.latents.dataset import LatentDataset
from stdit_train.config.schema import TrainConfig
from stdit_train.errors import ConfigError


def open_cached(config: TrainConfig) -> LatentDataset:
    """Open the cache that a run trains from.

    Raises:
        ConfigError: it holds clips of another shape, or texts of another length, than the run's.
        DataError: it is incomplete or damaged.
    """
    data = config.data
    dataset = LatentDataset(data.source, window=data.window)
    wanted = [parse_bucket(text) for text in data.buckets] or [Bucket(data.frames, data.height, data.width)]
    other = [bucket for bucket in dataset.buckets if bucket not in wanted]
    if other:
        sizes = {"frames": other[0].frames, "height": other[0].height, "width": other[0].width}
        options = " ".join(f"--set data.{name}={value}" for name, value in sizes.items())
        raise ConfigError(
            f"{data.source} holds clips of {other[0]}, stage {config.stage} trains on {', '.join(map(str, wanted))}: "
            f"encode again with --stage {config.stage}, or train with {options}"
        )
    about = dataset.text_metadata
    if about is not None and about["max_length"] != config.model.model_max_length:
        raise ConfigError(
            f"{data.source} holds texts of up to {about['max_length']} tokens, the run's model.model_max_length is "
            f"{config.model.model_max_length}: set it to the same, or encode the texts again (--text-only)"
        )
    return dataset


def is_of_shapes(dataset: LatentDataset) -> bool:
    """Return whether a cache was made from `shapes`."""
    return dataset.metadata["manifest"]["source"].split(":")[0] == "shapes"


def validation_of_shapes(config: TrainConfig) -> ShapesDataset:
    """Return the validation clips of `shapes`, for a cache made from it.

    Raises:
        ConfigError: the run names other validation clips.
    """
    data = config.data
    if data.validation or data.validation_source is not None:
        raise ConfigError(
            f"{data.source} is a cache of `shapes`, which has validation clips: leave data.validation and "
            "data.validation_source out"
        )
    size = {"frames": data.frames, "height": data.height, "width": data.width}
    return ShapesDataset(split="val", length=64, fps=data.fps, **size)


def cached_prompts(dataset: LatentDataset, count: int) -> list[str]:
    """Return the first `count` distinct captions, to sample during training."""
    captions = (dataset.caption(i) for i in range(len(dataset)))
    return list(islice(dict.fromkeys(caption for caption in captions if caption), count)) or [""]
