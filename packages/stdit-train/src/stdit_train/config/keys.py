"""The keys of a run's settings, and the nearest known ones to a key that does not exist."""

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import get_type_hints

from stdit_train.config.schema import TrainConfig
from stdit_train.errors import ConfigError

RENAMED = {  # since 0.2.0; the old keys are read until 0.3
    "objective.given": "objective.conditioning_share",
    "objective.given_of": "objective.conditioning_clips",
    "data.remember_latents": "data.cache_latents",
    "trains": "network",
}
ALSO_CALLED = {"learning_rate": "optimizer.lr", "batch_size": "global_batch", "dropout": "objective.caption_dropout"}


@cache
def known_keys() -> tuple[str, ...]:
    """Return every key that can be set, dotted."""
    return tuple(_keys(TrainConfig))


def check_key(given: str, option: str) -> None:
    """Check that a dotted key can be set.

    Raises:
        ConfigError: it does not exist; the message begins with the option, and names the nearest known ones.
    """
    if RENAMED.get(given, given) not in known_keys():
        raise ConfigError(f"{option} {given}: {unknown_key(given)}")


def unknown_key(key: str) -> ConfigError:
    """Return the error of a key that does not exist, with the nearest known ones."""
    if "/" in key:
        return ConfigError(
            f"--set {key}: STAGE/KEY is for the stages of a --curriculum; a single stage takes KEY=VALUE"
        )
    return ConfigError(
        f"unknown setting {key!r}{did_you_mean(key, known_keys()) or '; known are ' + ', '.join(known_keys())}"
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question with the nearest known names, to end a message with; empty if none is near."""
    known, leaf = list(known), name.split(".")[-1]
    near = [key for key in known if key == ALSO_CALLED.get(leaf)]
    near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    near += [key for key in known if key.split(".")[-1] == leaf and key not in near]
    near = near or [key for key in known if leaf in key.split(".")[-1]]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _keys(cls: type, prefix: str = "") -> Iterable[str]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name
