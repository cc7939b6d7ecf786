"""Whether what a run reads is there, found without torch, so that a wrong name is told at once."""

import importlib.util
from pathlib import Path
from typing import Any

from stdit_data.manifests.format import check_manifest
from stdit_model.weights.find_lora import require_peft
from stdit_model.weights.hub import hub_options, hub_reason, local_path, split_hub_id
from stdit_train.assets import resolve_source
from stdit_train.components.sizes import Part, check_clips, check_part
from stdit_train.config.load import read_settings
from stdit_train.config.resolve import cached_text_width, is_cached
from stdit_train.config.schema import TrainConfig
from stdit_train.errors import ConfigError


def check_inputs(config: TrainConfig, *, begun: bool) -> None:
    """Check that what a run reads exists, before anything is loaded: clips, initial weights, VAE and text encoder.

    Args:
        config: the run's settings.
        begun: whether the run has begun, and needs its initial weights no more, unless it has frozen ones.

    Raises:
        DataError: there are no such clips.
        WeightsError: there are no such weights.
        ConfigError: VAE or text encoder cannot be found or fetched, or is another model; or torchao is not installed,
            and needed.
        SettingsError: likewise for peft.
    """
    check_packages(config)
    if config.data.source != "shapes" and not is_cached(config):
        check_manifest(config.data.source)
    if config.network == "vae":
        if is_cached(config):
            raise ConfigError(f"{config.data.source} is a cache: a VAE is trained on videos or pictures themselves")
        if config.init is not None and not begun:
            check_vae_source(config.init, "--init")
        return
    if config.init is not None and (config.partial or not begun):
        local_path(resolve_source(config.init))
    check_sources(config, begun=begun)


def check_packages(config: TrainConfig) -> None:
    """Check that the packages are installed that only some runs need.

    Raises:
        SettingsError: an adapter is to be trained, and peft is not; the message has the command that installs it.
        ConfigError: likewise for frozen weights in 8 bits, and torchao.
    """
    if config.lora.rank is not None:
        require_peft("--lora")
    if config.frozen == "int8" and importlib.util.find_spec("torchao") is None:
        raise ConfigError("frozen=int8 needs torchao: run `uv sync --extra int8`, or pip install 'stdit-train[int8]'")


def check_sources(config: TrainConfig, *, begun: bool = False) -> None:
    """Check that a run's components exist, without loading them: their folders, or config.json of their Hub ids.

    Args:
        config: the run's settings.
        begun: whether the run has begun; it goes on with clips that do not fill the VAE's latents.

    Raises:
        ConfigError: one of them cannot be found or fetched or is another model, or the VAE cannot take clips of the
            run's length.
    """
    values = check_vae_source(config.data.vae)
    if not begun:
        check_clips(config, values)
    if cached_text_width(config) is None:
        _read_config(config.data.text_encoder, "text_encoder", "--text-encoder")


def check_vae_source(source: str, option: str = "--vae") -> dict[str, Any]:
    """Check that a VAE exists, without loading it, and return its configuration; `option` is how it was named.

    Raises:
        ConfigError: it cannot be found or fetched, or is another model.
    """
    return _read_config(source, "vae", option)


def locate(source: str, part: str) -> str:
    """Return a part's subfolder in a pipeline folder, or the source itself; "demo" is the bundled pipeline."""
    place = resolve_source(source)
    folder = Path(place) / part
    return str(folder) if folder.is_dir() else place


def check_path(source: str, what: str, option: str) -> None:
    """Check that what can only be a local path exists.

    Raises:
        ConfigError: it does not.
    """
    if Path(source).exists():
        return
    hub_id = split_hub_id(source)
    deep = hub_id is not None and hub_id[1] and (what != "VAE" or Path(source.split("/")[0]).is_dir())
    if source.startswith((".", "/", "~")) or hub_id is None or deep:
        raise ConfigError(f"no {what} at {source}: give a folder or a Hub id with {option}")


def split_source(source: str) -> tuple[str, str]:
    """Return a folder, or the Hub id of a repository, and the folder inside the latter."""
    hub_id = None if Path(source).exists() else split_hub_id(source)
    return hub_id or (source, "")


def not_loaded(source: str, what: str, option: str, error: Exception) -> ConfigError:
    """Return the error of a component that cannot be read or fetched, with what to do."""
    repo, inside = split_source(source)
    of_pipeline = "" if inside or what != "VAE" or Path(source).exists() else f"; in a pipeline it is {source}/vae"
    return ConfigError(
        f"cannot load the {what} {source!r}: {hub_reason(error, source)}{of_pipeline}. Download it where there is a "
        f"network (hf download {repo}), or give a folder with {option}; `{option} demo` is the bundled one"
    )


def _read_config(source: str, part: Part, option: str) -> dict[str, Any]:
    """Return the configuration of a VAE or text encoder; nothing of a folder that lacks it."""
    file = _check_source(locate(source, part), "VAE" if part == "vae" else "text encoder", option)
    if not file.is_file():
        return {}
    values = read_settings(file)
    check_part(values, source, part, option)
    return values


def _check_source(source: str, what: str, option: str) -> Path:
    """Return the path of a model's config.json, which a folder may lack."""
    check_path(source, what, option)
    if Path(source).exists():
        return Path(source) / "config.json"
    from huggingface_hub import hf_hub_download

    try:
        repo, inside = split_source(source)
        return Path(hf_hub_download(repo, f"{inside}/config.json".lstrip("/"), **hub_options()))
    except (OSError, ValueError) as error:
        raise not_loaded(source, what, option, error) from error
