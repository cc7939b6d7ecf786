"""What an ablation compares: its arms, each some settings on top of a stage, made equal in one respect."""

import itertools
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from stdit_model.blocks import mixings
from stdit_model.presets import VARIANTS, Variant
from stdit_train.config.load import ConfigError, TrainConfig, from_dict, parse_overrides, set_values, to_dict
from stdit_train.estimate.training import Estimate, estimate_run

Match = Literal["steps", "parameters", "flops", "time"]
MATCHES: tuple[Match, ...] = get_args(Match)
CLOSE_ENOUGH = 0.02  # of the parameters that another depth may miss before another width is taken
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


def with_steps(arm: Arm, steps: int, given: dict[str, Any]) -> Arm:
    """So many steps, validated ten times along the way; `given` settings are the user's and stay."""
    spread = {
        "steps": steps,
        "validate_every": max(steps // 10, 1),
        "sample_every": steps,
        "checkpoint_every": max(steps // 5, 1),
        "log_every": 5,
    }
    return replace(arm, settings={**arm.settings, **{key: value for key, value in spread.items() if key not in given}})


def with_parameters_matched(arm: Arm, base: TrainConfig, target: int) -> Arm:
    """The depth, or else the width, that comes nearest to so many parameters.

    Another depth keeps the blocks as they are, and with them their initial weights, so it is taken where it comes
    within 2 %; latte's depth changes by whole turns. Else another width, in steps that the heads divide.
    """
    config = arm.config(base)
    size = model_size(config)
    turn = len(dict.fromkeys(mixings(config.model.variant, size["depth"])))
    depths = _around(size["depth"], turn)
    depth = min(depths, key=lambda n: abs(_parameters(arm, base, {"model.depth": n}) - target))
    if abs(_parameters(arm, base, {"model.depth": depth}) - target) <= CLOSE_ENOUGH * target:
        return replace(arm, settings={**arm.settings, "model.depth": depth})
    heads = size["num_heads"]
    unit = heads if heads % 4 == 0 else 2 * heads if heads % 2 == 0 else 4 * heads  # positions take quarters
    widths = _around(size["hidden_size"], unit)
    width = min(widths, key=lambda n: abs(_parameters(arm, base, {"model.hidden_size": n}) - target))
    return replace(arm, settings={**arm.settings, "model.hidden_size": width})


def _around(value: int, unit: int) -> list[int]:
    """Multiples of a unit away from a value, half of it to twice."""
    return [n for n in range(value % unit or unit, 2 * value + 1, unit) if 2 * n >= value]


def model_size(config: TrainConfig) -> dict[str, int]:
    """depth, hidden_size and num_heads of a run, the preset's where the run sets none."""
    from stdit_model.presets import preset

    named = preset(config.model.preset)
    return {key: getattr(config.model, key) or named[key] for key in ("depth", "hidden_size", "num_heads")}


def _parameters(arm: Arm, base: TrainConfig, settings: dict[str, Any]) -> int:
    return estimate_arm(replace(arm, settings={**arm.settings, **settings}).config(base)).parameters


def estimate_arm(config: TrainConfig) -> Estimate:
    """Parameters, FLOPs and memory of a run of the whole batch at once, unless set otherwise."""
    return estimate_run(replace(config, micro_batch=config.micro_batch or config.global_batch))


def same_start(
    build: Callable[[TrainConfig], Any], configs: Sequence[TrainConfig], wanted: TrainConfig
) -> tuple[Any, float]:
    """A model of `wanted` whose parameters equal those of all others wherever name and shape are the same.

    The models are made one after the other, in a fixed order; the first that has a parameter decides on it. So the
    start doesn't depend on which run is trained when, or alone.

    Args:
        build: makes a run's model.
        configs: of all arms with one seed, the order that decides; `wanted` among them.
        wanted: whose model to return.

    Returns:
        The model, and the share of its parameters that the first arm's model has too.
    """
    known: dict[tuple[str, Any], Any] = {}
    made: Any = None
    first: set[tuple[str, Any]] | None = None
    for config in configs:
        model = build(config)
        weights = {(name, tuple(value.shape)): value for name, value in model.state_dict().items()}
        first = first or set(weights)
        for key, value in weights.items():
            known.setdefault(key, value)
        if config == wanted:
            made = model
            break
    assert made is not None, "the wanted run is not among the arms"
    assert first is not None
    made.load_state_dict({name: known[name, tuple(value.shape)] for name, value in made.state_dict().items()})
    counts = {key: made.state_dict()[key[0]].numel() for key in _keys(made)}
    return made, sum(count for key, count in counts.items() if key in first) / sum(counts.values())


def _keys(model: Any) -> Iterator[tuple[str, Any]]:
    for name, value in model.state_dict().items():
        yield name, tuple(value.shape)


def total_flops(config: TrainConfig) -> int:
    """Of all steps of a run."""
    return config.steps * estimate_arm(config).step_flops
