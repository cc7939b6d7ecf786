"""What an ablation compares: its arms, each some settings on top of a stage, made equal in one respect."""

import itertools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from stdit_model.presets import VARIANTS, Variant
from stdit_train.config.load import ConfigError, from_dict, parse_overrides, set_values, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.estimate.training import Estimate, estimate_run

Match = Literal["steps", "parameters", "flops", "time"]


MATCHES: tuple[Match, ...] = get_args(Match)


# Settings that change what the validation loss measures: arms that differ in them are compared by their videos.
_OTHER_LOSS = (
    *("objective.name", "objective.shift", "objective.min_snr", "data.source", "data.vae"),
    *("data.frames", "data.height", "data.width"),
)


@dataclass(frozen=True)
class Arm:
    """One of the things compared; with a seed, a run."""

    name: str  # fit for a folder
    settings: dict[str, Any] = field(default_factory=dict)  # by dotted key

    def config(self, base: TrainConfig, seed: int | None = None) -> TrainConfig:
        """The configuration of this arm's run with a seed."""
        own = self.settings if seed is None else {**self.settings, "seed": seed}
        return from_dict(set_values(to_dict(base), own))


def parse_variants(text: str) -> list[Variant]:
    """A comma-separated list of variants.

    Raises:
        ConfigError: one that does not exist, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"unknown variant {name!r}: choose from {', '.join(VARIANTS)}")
    if not names:
        raise ConfigError(f"no variants given: choose from {', '.join(VARIANTS)}")
    return [variant for variant in VARIANTS if variant in names]


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """`key=a,b,c` to a key and its values, each read as TOML; what is no TOML is a string.

    Raises:
        ConfigError: no "=", or fewer than two different values.
    """
    key, equals, listed = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--vary {text}: expected key=a,b,c, for instance objective.name=iddpm,flow")
    try:
        values = tomllib.loads(f"values = [{listed}]")["values"]
    except tomllib.TOMLDecodeError:
        parts = [part.strip() for part in listed.split(",") if part.strip()]
        values = [parse_overrides([f"value={part}"])["value"] for part in parts]
    different = [value for i, value in enumerate(values) if value not in values[:i]]
    if len(different) < 2:
        raise ConfigError(f"--vary {text}: expected two different values or more, for instance {key}=a,b")
    if key.strip() in ("seed", "steps", "minutes", "model.variant"):
        option = {"seed": "--seeds", "model.variant": "--variants"}.get(key.strip(), "--match")
        raise ConfigError(f"--vary {key.strip()}: {option} is there for that")
    return key.strip(), different


def make_arms(base: TrainConfig, variants: Sequence[Variant], varied: Sequence[tuple[str, list[Any]]]) -> list[Arm]:
    """Every variant with every combination of the varied settings' values; checked.

    Raises:
        ConfigError: a key that does not exist, or a value that it can't have.
    """
    keys = [key for key, _ in varied]
    arms = []
    for variant in variants:
        for values in itertools.product(*(values for _, values in varied)):
            settings = {"model.variant": variant, **dict(zip(keys, values, strict=True))}
            parts = [f"{key.split('.')[-1]}={_plain(value)}" for key, value in zip(keys, values, strict=True)]
            name = "-".join(([variant] if len(variants) > 1 or not parts else []) + parts)
            arms.append(Arm(_safe(name), settings))
    for arm in arms:
        arm.config(base)
    return arms


def _safe(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name)


def _plain(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def reference_arm(base: TrainConfig, arms: Sequence[Arm]) -> Arm:
    """What the others are matched to: the stage's own variant where it takes part, else the first."""
    return next((arm for arm in arms if arm.settings["model.variant"] == base.model.variant), arms[0])


def loss_is_comparable(base: TrainConfig, arms: Sequence[Arm]) -> bool:
    """Whether the arms' validation losses measure the same thing."""
    measured = [{key: repr(_value(arm.config(base), key)) for key in _OTHER_LOSS} for arm in arms]
    return all(values == measured[0] for values in measured)


def _value(config: TrainConfig, key: str) -> Any:
    section, _, leaf = key.partition(".")
    return getattr(getattr(config, section), leaf)


def estimate_arm(config: TrainConfig) -> Estimate:
    """Parameters, FLOPs and memory of a run of the whole batch at once, unless set otherwise."""
    return estimate_run(replace(config, micro_batch=config.micro_batch or config.global_batch))
