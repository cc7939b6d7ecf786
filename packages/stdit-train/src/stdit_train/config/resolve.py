""""""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stdit_data.latents.format import Part, is_cache, read_metadata
from stdit_train.config.schema import TrainConfig

PARTS: dict[str, Part] = {"vae": "video", "text_encoder": "text"}


def is_cached(config: TrainConfig) -> bool:
    """Whether a run's data are a cache."""
    return config.data.source != "shapes" and is_cache(config.data.source)


def with_cached_parts(config: TrainConfig, named: Mapping[str, Any]) -> TrainConfig:
    """The configuration with the VAE and the text encoder that its cache was made with, where `named` (settings by
    dotted key) names no other. The names are the cache's: "demo" is still to be resolved."""
    sources = {}
    for key, part in PARTS.items():
        about = read_metadata(config.data.source, part)
        if about is not None and f"data.{key}" not in named:
            sources[key] = about[key]["source"]
    return replace(config, data=replace(config.data, remember_latents=False, **sources))


def cached_text_width(config: TrainConfig) -> int | None:
    """Width of the texts of a run's cache; None without a cache of texts."""
    about = read_metadata(config.data.source, "text") if is_cached(config) else None
    return about["text_encoder"]["width"] if about is not None else None
