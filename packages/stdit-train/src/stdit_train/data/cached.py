"""Training from a cache of latents and text embeddings: its components by default, and that everything fits."""

from itertools import islice

from stdit_data.buckets import Bucket, parse_bucket
from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.latents.dataset import LatentDataset
from stdit_train.config.load import ConfigError
from stdit_train.config.schema import TrainConfig


def open_cached(config: TrainConfig) -> LatentDataset:
    """The cache of a run.

    Raises:
        ConfigError: it holds another shape than the run's.
        DataError: it is not whole.
    """
    data = config.data
    dataset = LatentDataset(data.source, window=data.window)
    wanted = [parse_bucket(text) for text in data.buckets] or [Bucket(data.frames, data.height, data.width)]
    other = [bucket for bucket in dataset.buckets if bucket not in wanted]
    if other:
        sizes = f"--set data.frames={other[0].frames} data.height={other[0].height} data.width={other[0].width}"
        raise ConfigError(
            f"{data.source} holds clips of {other[0]}, stage {config.stage} trains on {', '.join(map(str, wanted))}: "
            f"encode anew with --stage {config.stage}, or train with {sizes.replace(' data', ' --set data')}"
        )
    about = dataset.about_text
    if about is not None and about["max_length"] != config.model.model_max_length:
        raise ConfigError(
            f"{data.source} holds texts of up to {about['max_length']} tokens, the run's model.model_max_length is "
            f"{config.model.model_max_length}: set it to the same, or encode the texts anew (--text-only)"
        )
    return dataset


def is_of_shapes(dataset: LatentDataset) -> bool:
    """Whether `shapes` is what the cache was made of."""
    return dataset.about["manifest"]["source"].split(":")[0] == "shapes"


def validation_of_shapes(config: TrainConfig) -> ShapesDataset:
    """Clips of `shapes` to validate on, for a cache of it.

    Raises:
        ConfigError: the run names others.
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
    """The first different captions, to be sampled along the way."""
    captions = (dataset.caption(i) for i in range(len(dataset)))
    return list(islice(dict.fromkeys(caption for caption in captions if caption), count)) or [""]
