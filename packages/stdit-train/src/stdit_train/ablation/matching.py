"""How many steps fit into the minutes that an ablation may take, from a few steps of each arm timed on this machine."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from stdit_data.loading.prefetch import Batch
from stdit_model.blocks import mixings
from stdit_train.ablation.arms import Arm, Match, estimate_arm, reference_arm
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import ConfigError
from stdit_train.config.schema import TrainConfig
from stdit_train.trainer import Trainer

TIMED_STEPS = 4


LEAST_STEPS = 20


VALIDATIONS = 10


SHARE = 0.9  # of the budget that is planned with


RUN_SECONDS = 4.0  # what saving, loading and drawing plots take in each run


@dataclass(frozen=True)
class Cost:
    """Seconds of the parts of a run."""

    step: float
    validation: float
    prompt: float  # to sample one video
    clip: float  # to draw and encode one


def measure_cost(config: TrainConfig, trainer: Callable[[TrainConfig, RunFolder], Trainer]) -> Cost:
    """Time a few steps, a validation and a batch of samples of a run that is thrown away."""
    from stdit_train.pipeline.save import draw_samples

    with tempfile.TemporaryDirectory() as folder:
        made = trainer(config, RunFolder(Path(folder)))
        clips, seconds = [], []
        size = config.micro_batch or config.global_batch
        for index in range(size):
            started = time.perf_counter()
            clips.append(made.loader.dataset.load(index, seed=0, epoch=0))
            seconds.append(time.perf_counter() - started)
        bucket = made.loader.dataset.bucket(0)
        batch = Batch(
            video=torch.stack([clip.video for clip in clips]),
            captions=[clip.caption for clip in clips],
            indices=list(range(size)),
            fps=[clip.fps for clip in clips],
            bucket=bucket,
            epoch=0,
            step=0,
            repeats=0,
        )
        steps = []
        for _ in range(TIMED_STEPS + 1):
            started = time.perf_counter()
            made.train_step([batch] * (config.global_batch // size))
            steps.append(time.perf_counter() - started)
        validation = _seconds(lambda: made.validation is not None and made.validate(made.validation))
        drawn = _seconds(
            lambda: draw_samples(made.ema.model, made.components, config, made.prompts, Path(folder) / "samples", 0)
        )
    return Cost(median(steps[1:]), validation, drawn / max(len(made.prompts), 1), median(seconds))


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def with_length(
    base: TrainConfig,
    arms: Sequence[Arm],
    match: Match,
    given: dict[str, Any],
    steps: int | None,
    minutes: float | None,
    seeds: int,
    prompts: int,
    costs: Mapping[str, Cost],
) -> list[Arm]:
    """The arms, each with its number of steps, or its minutes where time is matched.

    Args:
        base, arms: what is compared.
        match: what is equal: steps (also where parameters are), the FLOPs of all steps, or the time of all steps.
        given: settings that the user named; they stay.
        steps: of the reference arm; unless given, as many as fit into `minutes`.
        minutes: for everything together.
        seeds: runs of each arm.
        prompts: videos that each finished run is scored by.
        costs: of each arm, by name; needed for `minutes` and where time is matched.

    Raises:
        ConfigError: neither steps nor minutes.
    """
    reference = reference_arm(base, arms)
    share = {arm.name: _share(base, arm, reference, match, costs) for arm in arms}  # of the reference's steps
    if steps is None:
        if minutes is None:
            raise ConfigError("how long? give --steps or --minutes")
        steps = _fitting(base, arms, share, minutes * 60 * SHARE, seeds, prompts, costs)
    planned = []
    for arm in arms:
        arm = with_steps(arm, max(round(steps * share[arm.name]), 1), given)
        if match == "time":
            length = {"steps": 10**6, "minutes": steps * costs[reference.name].step / 60}
            arm = replace(arm, settings={**arm.settings, **length})
        planned.append(arm)
    return planned


def _share(base: TrainConfig, arm: Arm, reference: Arm, match: Match, costs: Mapping[str, Cost]) -> float:
    if match == "flops":
        return estimate_arm(reference.config(base)).step_flops / estimate_arm(arm.config(base)).step_flops
    if match == "time":
        return costs[reference.name].step / costs[arm.name].step
    return 1.0


def _fitting(
    base: TrainConfig,
    arms: Sequence[Arm],
    share: Mapping[str, float],
    seconds: float,
    seeds: int,
    prompts: int,
    costs: Mapping[str, Cost],
) -> int:
    """Steps of the reference arm that fit; each clip is drawn and encoded once for all arms of a seed."""
    found = [costs[arm.name] for arm in arms]
    fixed = seeds * sum(RUN_SECONDS + VALIDATIONS * cost.validation + (prompts + 4) * cost.prompt for cost in found)
    clip = max(cost.clip for cost in found)
    training = seeds * sum(costs[arm.name].step * share[arm.name] for arm in arms)
    epoch = base.data.clips / base.global_batch  # steps in which every clip is new
    drawing = seeds * clip * base.global_batch * max(share.values())
    steps = (seconds - fixed) / (training + drawing)
    if steps > epoch:
        steps = (seconds - fixed - drawing * epoch) / training
    return max(int(steps), LEAST_STEPS)


CLOSE_ENOUGH = 0.02  # of the parameters that another depth may miss before another width is taken


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
