"""Training from a cache of latents and text embeddings: its components by default, and that everything fits."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from stdit_data.buckets import Bucket, parse_bucket
from stdit_data.datasets.shapes import ShapesDataset
from stdit_data.latents.dataset import LatentDataset
from stdit_data.latents.format import Part, is_cache, read_about
from stdit_train.components.load import Components
from stdit_train.config.load import ConfigError, TrainConfig
from stdit_train.encoders import about_text_encoder, about_vae

PARTS: dict[str, Part] = {"vae": "video", "text_encoder": "text"}
SAID = {"vae": ("VAE", "--vae"), "text_encoder": ("text encoder", "--text-encoder")}


def is_cached(config: TrainConfig) -> bool:
    """Whether a run's data are a cache."""
    return config.data.source != "shapes" and is_cache(config.data.source)


def with_cached_parts(config: TrainConfig, named: Mapping[str, Any]) -> TrainConfig:
    """The configuration with the VAE and the text encoder that its cache was made with, where `named` (settings by
    dotted key) names no other. The names are the cache's: "demo" is still to be resolved."""
    sources = {}
    for key, part in PARTS.items():
        about = read_about(config.data.source, part)
        if about is not None and f"data.{key}" not in named:
            sources[key] = about[key]["source"]
    return replace(config, data=replace(config.data, remember_latents=False, **sources))


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


def cached_text_width(config: TrainConfig) -> int | None:
    """Width of the texts of a run's cache; None without a cache of texts."""
    about = read_about(config.data.source, "text") if is_cached(config) else None
    return about["text_encoder"]["width"] if about is not None else None


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


def check_components(dataset: LatentDataset, components: Components) -> None:
    """Looks whether the run's VAE, its scale and, where it has one, its text encoder are those of the cache.

    Raises:
        ConfigError: another one; the message names both.
    """
    _compare(dataset, "vae", dataset.about, about_vae(components.vae, components.vae_source))
    if components.text_encoder is not None:
        check_text_encoder(dataset, components.text_encoder, components.text_source)


def check_text_encoder(dataset: LatentDataset, encoder: Any, source: str) -> None:
    """Looks whether a text encoder is that of the cache, where it has texts.

    Raises:
        ConfigError: another one.
    """
    if dataset.about_text is not None:
        _compare(dataset, "text_encoder", dataset.about_text, about_text_encoder(encoder, source))


def _compare(dataset: LatentDataset, key: str, about: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    there, (what, option) = about[key], SAID[key]
    for fact in ("class", "hash", "scale"):
        if fact in there and there[fact] != asked[fact]:
            raise ConfigError(
                f"{dataset.url} was encoded with the {what} {there['source']} ({fact} {there[fact]}), this run has "
                f"{asked['source']} ({fact} {asked[fact]}): leave {option} out, or encode anew"
            )
