"""Measure what the runs of an ablation take on this machine, and how long they take together.

Arms are measured in turn, again and again, so that whatever else runs meanwhile slows all of them alike.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from stdit_data.loading.prefetch import Batch
from stdit_data.transforms import stack_videos
from stdit_train.ablation.arms import Arm, Study
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.schema import TrainConfig
from stdit_train.pipeline.load import load_pipeline
from stdit_train.trainer import Trainer

ROUNDS = 4  # turns of each arm, forth and back; a turn builds the model anew, so that one at a time is in memory
TIMED_STEPS = 2  # per turn, besides one to warm up
VALIDATIONS = 10  # per run
CHECKPOINTS = 5  # per run
SAMPLED = 4  # videos that a run samples during training


@dataclass(frozen=True)
class Cost:
    """Seconds that the parts of a run take."""

    step: float
    validation: float
    prompt: float  # to sample one video
    clip: float  # to load one clip
    start: float = 0.0  # from nothing to the first step, with the first validation's encoding
    save: float = 0.0  # a checkpoint, or the finished pipeline


def measure_costs(arms: Sequence[Arm], make_trainer: Callable[[Arm, RunFolder], Trainer]) -> dict[str, Cost]:
    """Time a few steps of each arm, in turns, and a validation, a batch of samples and a checkpoint of each.

    Args:
        arms: the arms, with names that differ.
        make_trainer: builds the trainer of an arm in a run folder; see `measured` for its settings.
    """
    steps: dict[str, list[float]] = {arm.name: [] for arm in arms}
    parts: dict[str, dict[str, float]] = {}
    for turn in range(ROUNDS):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            with tempfile.TemporaryDirectory() as folder:
                run, started = RunFolder(Path(folder) / "run"), time.perf_counter()
                trainer = make_trainer(arm, run)
                built = time.perf_counter() - started
                batches, clip = _load_batches(trainer)
                steps[arm.name] += _time_steps(trainer, batches)
                if turn == 0:
                    parts[arm.name] = _measure_parts(trainer, built) | {"clip": clip}
    return {arm.name: Cost(step=median(steps[arm.name]), **parts[arm.name]) for arm in arms}


def measured(config: TrainConfig) -> TrainConfig:
    """Return the settings to measure a run with: the learning rate is 0, so that no arm diverges."""
    return replace(config, optimizer=replace(config.optimizer, lr=0.0, muon_lr=0.0))


def study_seconds(study: Study, steps: Mapping[str, float], costs: Mapping[str, Cost]) -> float:
    """Return the seconds of all runs of a study.

    Args:
        study: for its seeds, prompts and clips.
        steps: of each arm, by name.
        costs: of each arm, by name.
    """
    if not steps:
        return 0.0
    training = sum(_run_seconds(study, costs[name], count) for name, count in steps.items())
    clips = min(max(steps.values()) * study.base.global_batch, study.base.data.clips)
    loading = clips * max(costs[name].clip for name in steps)  # each clip once for all arms of a seed
    return study.seeds * (training + loading)


def _run_seconds(study: Study, cost: Cost, steps: float) -> float:
    """Seconds of one run with its scores, without the loading of clips."""
    scored = 2 * study.prompts if study.base.data.source == "shapes" else 0
    fixed = cost.start + (VALIDATIONS + 1) * cost.validation + (SAMPLED + scored) * cost.prompt
    return fixed + (CHECKPOINTS + 1) * cost.save + steps * cost.step


def _load_batches(trainer: Trainer) -> tuple[list[Batch], float]:
    """Load the micro-batches of a step; also returns the seconds that a clip takes."""
    config, dataset = trainer.config, trainer.loader.dataset
    clips, seconds = [], []
    size = config.micro_batch or config.global_batch
    for index in range(size):
        started = time.perf_counter()
        clips.append(dataset.load(index, seed=0, epoch=0))
        seconds.append(time.perf_counter() - started)
    batch = Batch(
        video=stack_videos([clip.video for clip in clips]),
        captions=[clip.caption for clip in clips],
        indices=list(range(size)),
        fps=[clip.fps for clip in clips],
        bucket=dataset.bucket(0),
        epoch=0,
        step=0,
        repeats=0,
    )
    return [batch] * (config.global_batch // size), median(seconds)


def _time_steps(trainer: Trainer, batches: list[Batch]) -> list[float]:
    return [_seconds(lambda: trainer.train_step(batches)) for _ in range(1 + TIMED_STEPS)][1:]


def _measure_parts(trainer: Trainer, built: float) -> dict[str, float]:
    def validate() -> None:
        if trainer.outputs.validation is not None:
            trainer.outputs.validate()

    first, validation = _seconds(validate), _seconds(validate)  # the first encodes the clips
    sampling = _seconds(lambda: trainer.task.sample(trainer.ema.model, trainer.run.samples, 0, nullcontext))
    save = _seconds(trainer.finish)
    loading = _seconds(lambda: load_pipeline(str(trainer.run.path)))
    start = built + max(first - validation, 0.0) + loading
    return {
        "validation": validation,
        "prompt": sampling / max(len(trainer.task.prompts), 1),
        "start": start,
        "save": save,
    }


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
