"""What the shell completes: names of stages, curricula, devices and settings. Heavy imports are in the functions."""

from collections.abc import Callable
from importlib import resources


def choices(*names: str) -> Callable[[str], list[str]]:
    """Return a function that completes one of fixed names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def stages(incomplete: str) -> list[str]:
    """Complete the name of a stage."""
    return _toml_names("stages", incomplete)


def curricula(incomplete: str) -> list[str]:
    """Complete the name of a curriculum."""
    return _toml_names("curricula", incomplete)


def variants(incomplete: str) -> list[str]:
    """Complete the name of an attention variant."""
    from stdit_model.presets import VARIANTS

    return choices(*VARIANTS)(incomplete)


def samplers(incomplete: str) -> list[str]:
    """Complete the name of a sampler."""
    from stdit_model.sampling.schedulers import SAMPLERS

    return choices(*SAMPLERS)(incomplete)


def caches(incomplete: str) -> list[str]:
    """Complete the name of a cache."""
    from stdit_model.sampling.caches import DEFAULTS

    return choices(*DEFAULTS)(incomplete)


def gpus(incomplete: str) -> list[str]:
    """Complete the name of a device."""
    return choices("h200", "h100", "a100", "4090", "cpu")(incomplete)  # of stdit_train.hardware, which imports torch


def settings(incomplete: str) -> list[str]:
    """Complete the key of a setting, up to the equals sign."""
    from stdit_train.config.keys import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(incomplete)]


def _toml_names(folder: str, incomplete: str) -> list[str]:
    """Read names from the files' alone: `stdit_train.config.load`, which knows them, takes longer to import."""
    names = (path.name for path in resources.files("stdit_train.config").joinpath(folder).iterdir())
    return choices(*sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))(incomplete)
