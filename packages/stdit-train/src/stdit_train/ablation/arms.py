"""What an ablation compares: arms, each a stage with some settings of its own."""

import itertools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from stdit_model.presets import VARIANTS, Variant
from stdit_train.config.keys import check_key
from stdit_train.config.load import from_dict, parse_overrides, set_values, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.errors import ConfigError

if TYPE_CHECKING:
    from stdit_train.estimate.training import Estimate

Match = Literal["steps", "parameters", "flops", "time"]
MATCHES: tuple[Match, ...] = get_args(Match)

# Arms that differ in one of these have validation losses of different things.
_LOSS_SETTINGS = (
    *("objective.name", "objective.shift", "objective.min_snr", "data.source", "data.vae"),
    *("data.frames", "data.height", "data.width"),
)


@dataclass(frozen=True)
class Arm:
    """Settings to compare; with a seed, a run."""

    name: str  # fit for a folder
    settings: dict[str, Any] = field(default_factory=dict)  # by dotted key

    def config(self, base: TrainConfig, seed: int | None = None) -> TrainConfig:
        """Return the settings of this arm's run with a seed; the base's seed unless given.

        Raises:
            ConfigError: a key does not exist, or cannot have its value.
        """
        own = self.settings if seed is None else {**self.settings, "seed": seed}
        return from_dict(set_values(to_dict(base), own))


@dataclass(frozen=True)
class Study:
    """A comparison of arms: how long each is trained, how often, and what is held equal."""

    base: TrainConfig
    arms: Sequence[Arm]
    seeds: int
    match: Match
    steps: int | None  # of the reference arm; None for as many as fit into `minutes`
    minutes: float | None  # for all runs together
    prompts: int  # per split (seen, held-out) to score each run with; 0 for no scores
    given: dict[str, Any]  # settings that the user named, by dotted key; they are not changed

    def __post_init__(self) -> None:
        """Check that all weights of STDiTs are trained: their pipelines are compared, from equal initial weights."""
        if any(config.network == "vae" for config in (self.base, *(arm.config(self.base) for arm in self.arms))):
            raise ConfigError(
                "an ablation compares STDiTs, not VAEs: name a stage of STDiTs with --stage, and leave out network=vae"
            )
        if self.base.partial or any(arm.config(self.base).partial for arm in self.arms):
            raise ConfigError("an ablation trains all weights of each arm: leave out lora.rank and trained_weights")


def parse_variants(text: str) -> list[Variant]:
    """Parse a comma-separated list of variants.

    Raises:
        ConfigError: a variant does not exist, or the list is empty.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"unknown variant {name!r}: choose from {', '.join(VARIANTS)}")
    if not names:
        raise ConfigError(f"no variants given: choose from {', '.join(VARIANTS)}")
    return [variant for variant in VARIANTS if variant in names]


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """Parse `key=a,b,c` into the key and its values, each read as TOML, or as a string where it is not TOML.

    Raises:
        ConfigError: there is no "=", there are fewer than two different values, or the key has an option of its own.
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
        raise ConfigError(f"--vary {key.strip()}: use {option} instead")
    return key.strip(), different


def make_arms(base: TrainConfig, variants: Sequence[Variant], varied: Sequence[tuple[str, list[Any]]]) -> list[Arm]:
    """Combine every variant with every value of the varied settings.

    Raises:
        ConfigError: a key does not exist, or cannot have its value.
    """
    keys = [key for key, _ in varied]
    for key in keys:
        check_key(key, "--vary")
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


def reference_arm(base: TrainConfig, arms: Sequence[Arm]) -> Arm:
    """Return the arm that the others are matched to: the base's own variant where it takes part, else the first."""
    return next((arm for arm in arms if arm.settings["model.variant"] == base.model.variant), arms[0])


def loss_is_comparable(base: TrainConfig, arms: Sequence[Arm]) -> bool:
    """Tell whether the arms' validation losses measure the same thing."""
    measured = [{key: repr(_value(arm.config(base), key)) for key in _LOSS_SETTINGS} for arm in arms]
    return all(values == measured[0] for values in measured)


def estimate_arm(config: TrainConfig) -> "Estimate":
    """Estimate parameters, FLOPs and memory of a run, with the whole batch at once unless `micro_batch` is set."""
    from stdit_train.estimate.training import estimate_run  # with torch

    return estimate_run(replace(config, micro_batch=config.micro_batch or config.global_batch))


def _safe(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name)


def _plain(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _value(config: TrainConfig, key: str) -> Any:
    section, _, leaf = key.partition(".")
    return getattr(getattr(config, section), leaf)
