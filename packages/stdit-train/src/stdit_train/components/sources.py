"""Whether what a run reads is there, found without torch, so that a wrong name is told at once."""

from pathlib import Path

from stdit_data.manifests.format import check_manifest
from stdit_model.weights.hub import hub_options, hub_reason, local_path
from stdit_train.assets import resolve_source
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
        ConfigError: VAE or text encoder cannot be found or fetched.
    """
    if config.data.source != "shapes" and not is_cached(config):
        check_manifest(config.data.source)
    if config.trains == "vae":
        if is_cached(config):
            raise ConfigError(f"{config.data.source} is a cache: a VAE is trained on videos or pictures themselves")
        if config.init is not None and not begun:
            check_vae_source(config.init, "--init")
        return
    if config.init is not None and (config.partial or not begun):
        local_path(resolve_source(config.init))
    check_sources(config)


def check_sources(config: TrainConfig) -> None:
    """Check that a run's components exist, without loading them: their folders, or config.json of their Hub ids.

    Raises:
        ConfigError: one of them cannot be found or fetched; the message names it.
    """
    check_vae_source(config.data.vae)
    if cached_text_width(config) is None:
        _check_source(locate(config.data.text_encoder, "text_encoder"), "text encoder", "--text-encoder")


def check_vae_source(source: str, option: str = "--vae") -> None:
    """Check that a VAE exists, without loading it; `option` is how it was named.

    Raises:
        ConfigError: it cannot be found or fetched.
    """
    _check_source(locate(source, "vae"), "VAE", option)


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
    if (source.startswith((".", "/", "~")) or source.count("/") != 1) and not Path(source).exists():
        raise ConfigError(f"no {what} at {source}: give a folder or a Hub id with {option}")


def not_loaded(source: str, what: str, option: str, error: Exception) -> ConfigError:
    """Return the error of a component that cannot be read or fetched, with what to do."""
    return ConfigError(
        f"cannot load the {what} {source!r}: {hub_reason(error, source)}. Download it where there is a network "
        f"(hf download {source}), or give a folder with {option}; `{option} demo` is the bundled one"
    )


def _check_source(source: str, what: str, option: str) -> None:
    check_path(source, what, option)
    if not Path(source).exists():
        from huggingface_hub import hf_hub_download

        try:
            hf_hub_download(source, "config.json", **hub_options())
        except (OSError, ValueError) as error:
            raise not_loaded(source, what, option, error) from error
