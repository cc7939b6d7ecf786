"""Fill in the settings that follow from others: which VAE and text encoder go with the data."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stdit_train.assets import DEMO
from stdit_train.config.load import read_settings
from stdit_train.config.schema import DataConfig, TrainConfig


def resolve_config(config: TrainConfig, overrides: Mapping[str, Any], *, demo_parts: bool = True) -> TrainConfig:
    """Choose the VAE and the text encoder that go with a run's data, where none are named.

    A cache is read with those that made it, and a part of a pipeline is trained with those of the pipeline. The
    embedded set `shapes` stands in where no videos are given, and is encoded with the demo's, which are always at
    hand. A component is named by its folder, its Hub id, or the word "demo"; what "demo" stands for is looked up when
    the component is opened.

    Args:
        config: of a stage.
        overrides: the settings that the user named, by dotted key.
        demo_parts: whether `shapes` gets the demo's components. An estimate of a published stage leaves them out.

    Raises:
        DataError: the cache is damaged, or of another version of the format.
        ConfigError: the model_index.json of the pipeline is damaged.
    """
    data = config.data
    own = _pipeline_sources(config.init) if config.partial and config.init is not None else {}
    if data.source != "shapes":
        sources = own | _cache_sources(data.source)
    else:
        sources = ({"vae": DEMO, "text_encoder": DEMO} if demo_parts else {}) | own
    sources = {key: source for key, source in sources.items() if f"data.{key}" not in overrides}
    return replace(
        config,
        data=replace(
            data,
            vae=sources.get("vae", data.vae),
            text_encoder=sources.get("text_encoder", data.text_encoder),
            # Clips of videos start at random places: no two epochs see the same frames, so there is nothing to keep.
            cache_latents=data.cache_latents and data.source == "shapes",
        ),
    )


def shapes_only(config: TrainConfig) -> str | None:
    """Return a warning where a run's clips are encoded with the demo's VAE or text encoder; None for `shapes`.

    Raises:
        DataError: a damaged cache.
    """
    data = config.data
    if config.network == "vae" or data.source == "shapes" or DEMO not in (data.vae, data.text_encoder):
        return None
    if is_cached(config):
        from stdit_data.latents.format import read_metadata

        about = read_metadata(data.source, "video") or read_metadata(data.source, "text")
        if about is not None and about["manifest"]["source"].split(":")[0] == "shapes":
            return None
    published = DataConfig()
    reasons: list[str] = []
    options: list[str] = []
    if data.vae == DEMO:
        reasons.append("VAE knows flat shapes alone, and other footage becomes blobs")
        options.append(f"--vae {published.vae}")
    if data.text_encoder == DEMO:
        reasons.append("text encoder knows the words of `shapes` alone")
        options.append(f"--text-encoder {published.text_encoder}")
    again = "encode with" if is_cached(config) else "take"
    return f"warning: the demo's {', and its '.join(reasons)}: {again} {' '.join(options)}, or others"


def model_words(config: TrainConfig) -> str:
    """Return what a run trains, in a word or two."""
    if config.network == "vae":
        return f"{config.vae.kind} VAE"
    return f"{config.model.preset} {config.model.variant}"


def is_cached(config: TrainConfig) -> bool:
    """Tell whether a run trains on a latent cache."""
    if config.data.source == "shapes":
        return False
    from stdit_data.latents.format import is_cache

    return is_cache(config.data.source)


def cached_text_width(config: TrainConfig) -> int | None:
    """Return the width of the text states in a run's cache, None where there are none."""
    if config.data.source == "shapes":
        return None
    from stdit_data.latents.format import read_metadata

    about = read_metadata(config.data.source, "text")
    return None if about is None else about["text_encoder"]["width"]


def _pipeline_sources(init: str) -> dict[str, str]:
    """Return the VAE and the text encoder of a pipeline or a run on this machine; nothing of weights alone."""
    if init == DEMO:
        return {"vae": DEMO, "text_encoder": DEMO}
    folder = Path(init).expanduser()
    folder = folder / "pipeline" if (folder / "pipeline").is_dir() else folder
    index = folder / "model_index.json"
    named = read_settings(index).get("_hub_components", {}) if index.is_file() else {}
    parts = {part: str(folder) for part in ("vae", "text_encoder") if (folder / part).is_dir()}
    return parts | {part: name for part, name in named.items() if part in ("vae", "text_encoder")}


def _cache_sources(url: str) -> dict[str, str]:
    """Return the VAE and the text encoder of a cache, as far as it is one."""
    from stdit_data.latents.format import read_metadata

    video, text = read_metadata(url, "video"), read_metadata(url, "text")
    abouts = {"vae": video, "text_encoder": text}
    return {key: about[key]["source"] for key, about in abouts.items() if about is not None}
