"""Make arms equal: in steps, parameters, FLOPs or time, and in their initial weights.

The number of steps follows from a time budget, by what the arms cost on this machine.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stdit_model import STDiT
from stdit_model.blocks import mixings
from stdit_model.presets import preset
from stdit_train.ablation.arms import Arm, Study, estimate_arm, reference_arm
from stdit_train.ablation.costs import CHECKPOINTS, VALIDATIONS, Cost, study_seconds
from stdit_train.config.schema import TrainConfig
from stdit_train.errors import ConfigError

MIN_STEPS = 20  # of a run, however short the budget
BUDGET_SHARE = 0.9  # of the minutes that is planned with
DEPTH_TOLERANCE = 0.02  # share of the parameters that another depth may miss before the width is changed instead


def with_length(study: Study, arms: list[Arm], minutes: float | None, costs: Mapping[str, Cost]) -> list[Arm]:
    """Set each arm's number of steps; where time is matched, as many as take the same seconds by their costs.

    Args:
        study: what is compared, and what is held equal.
        arms: its arms, with parameters matched.
        minutes: what is left of the study's minutes.
        costs: of each arm, by name; not needed where `study.steps` is given and time is not matched.

    Raises:
        ConfigError: neither steps nor minutes are given.
    """
    reference = reference_arm(study.base, arms)
    shares = {arm.name: _share(study, arm, reference, costs) for arm in arms}  # of the reference's steps
    steps = study.steps
    if steps is None:
        if minutes is None:
            raise ConfigError("an ablation needs a length: give --steps or --minutes")
        steps = _fitting_steps(study, shares, minutes * 60 * BUDGET_SHARE, costs)
    return [with_steps(arm, max(round(steps * shares[arm.name]), 1), study.given) for arm in arms]


def with_steps(arm: Arm, steps: int, given: Mapping[str, Any]) -> Arm:
    """Set an arm's number of steps and validate ten times during them; `given` settings are not changed."""
    spread = {
        "steps": steps,
        "validate_every": max(steps // VALIDATIONS, 1),
        "sample_every": steps,
        "checkpoint_every": max(steps // CHECKPOINTS, 1),
        "log_every": 5,
    }
    return replace(arm, settings={**arm.settings, **{key: value for key, value in spread.items() if key not in given}})


def with_parameters_matched(arm: Arm, base: TrainConfig, target: int) -> Arm:
    """Set the depth, or else the width, that brings an arm nearest to `target` parameters.

    Another depth keeps the blocks and their initial weights, so it is preferred where it comes within 2 %. latte's
    depth changes by whole periods of its blocks. The width changes in steps that the heads divide.
    """
    config = arm.config(base)
    size = model_size(config)
    period = len(dict.fromkeys(mixings(config.model.variant, size["depth"])))
    depths = _around(size["depth"], period)
    depth = min(depths, key=lambda n: abs(_parameters(arm, base, {"model.depth": n}) - target))
    if abs(_parameters(arm, base, {"model.depth": depth}) - target) <= DEPTH_TOLERANCE * target:
        return replace(arm, settings={**arm.settings, "model.depth": depth})
    heads = size["num_heads"]
    unit = heads if heads % 4 == 0 else 2 * heads if heads % 2 == 0 else 4 * heads  # position embeddings take quarters
    widths = _around(size["hidden_size"], unit)
    width = min(widths, key=lambda n: abs(_parameters(arm, base, {"model.hidden_size": n}) - target))
    return replace(arm, settings={**arm.settings, "model.hidden_size": width})


def model_size(config: TrainConfig) -> dict[str, int]:
    """Return depth, hidden_size and num_heads of a run: its own or, where it sets none, the preset's."""
    named = preset(config.model.preset)
    return {key: getattr(config.model, key) or named[key] for key in ("depth", "hidden_size", "num_heads")}


def share_initial_weights(models: Iterable[STDiT]) -> tuple[STDiT, float]:
    """Give a model the initial weights of others, wherever name and shape of a parameter are the same.

    Where several models have a parameter, the first decides, so that the result does not depend on which arm is
    trained when, or alone.

    Args:
        models: of the arms with one seed, the reference arm first; the last is the one to change.

    Returns:
        The last model, and the share of its parameters that it has in common with the first.
    """
    known: dict[tuple[str, torch.Size], Tensor] = {}
    first: set[tuple[str, torch.Size]] = set()
    for model in models:
        for name, value in model.state_dict().items():
            known.setdefault((name, value.shape), value)
        first = first or set(known)
    weights = model.state_dict()
    model.load_state_dict({name: known[name, value.shape] for name, value in weights.items()})
    shared = sum(value.numel() for name, value in weights.items() if (name, value.shape) in first)
    return model, shared / sum(value.numel() for value in weights.values())


def _share(study: Study, arm: Arm, reference: Arm, costs: Mapping[str, Cost]) -> float:
    if study.match == "flops":
        reference_flops = estimate_arm(reference.config(study.base)).step_flops
        return reference_flops / estimate_arm(arm.config(study.base)).step_flops
    if study.match == "time":
        return costs[reference.name].step / costs[arm.name].step
    return 1.0


def _fitting_steps(study: Study, shares: Mapping[str, float], seconds: float, costs: Mapping[str, Cost]) -> int:
    """Return the most steps of the reference arm that fit, `MIN_STEPS` at least."""

    def taken(steps: int) -> float:
        return study_seconds(study, {name: steps * share for name, share in shares.items()}, costs)

    fits, too_many = MIN_STEPS, 10**9
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if taken(middle) <= seconds else (fits, middle)
    return fits


def _around(value: int, unit: int) -> list[int]:
    """Return the values a multiple of a unit away from one, from half of it to twice."""
    return [n for n in range(value % unit or unit, 2 * value + 1, unit) if 2 * n >= value]


def _parameters(arm: Arm, base: TrainConfig, settings: dict[str, Any]) -> int:
    return estimate_arm(replace(arm, settings={**arm.settings, **settings}).config(base)).parameters
