"""How many steps fit into the minutes that an ablation may take, from a few steps of each arm timed on this machine."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from stdit_data.loading.prefetch import Batch
from stdit_train.ablation.arms import Arm, Match, estimate_arm, reference_arm, with_steps
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import ConfigError, TrainConfig
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
