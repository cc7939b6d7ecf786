"""Schedules: stages that follow one another, each from the weights and the average that the one before ended with.

A schedule's folder holds schedule.json and a run folder for each stage: 1-16x256/, 2-16x256-hq/, ...
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from stdit_train.build import open_trainer
from stdit_train.callbacks import Callback, NullCallback, Outcome
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.components.load import Components, load_components
from stdit_train.config.resolve import is_cached
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.world import World


class Stage(NamedTuple):
    """One run of several, or the only one."""

    config: TrainConfig  # as asked for
    fitted: TrainConfig  # with the micro-batch that fits here
    run: RunFolder


def stage_folder(folder: Path, number: int, config: TrainConfig) -> RunFolder:
    """The run folder of a schedule's stage, numbered from 1."""
    return RunFolder(folder / f"{number}-{config.stage}")


def train_stages(
    stages: Sequence[Stage], watch: Callable[[int, Stage], Callback], processes: World | None = None
) -> tuple[int, Outcome | None]:
    """Train what is not done yet, each stage from its last checkpoint where it has one.

    Args:
        stages: in order.
        watch: gives the watcher of a stage, numbered from 1.
        processes: that train together; this one unless given.

    Returns:
        The number of the stage that ended last, and how; None where all had been done before.

    Raises:
        RunEnded: a stage can't go on.
    """
    processes = processes or World()
    device, loaded = processes.device(), dict[tuple[str, str, str], Components]()
    outcome, previous = None, None
    for number, stage in enumerate(stages, start=1):
        if len(stages) == 1 or not processes.decided(partial(_is_done, stage, number == len(stages))):
            config = stage.fitted
            parts = config.data.vae, config.data.text_encoder, config.precision
            if not is_cached(config) and parts not in loaded:
                loaded = {parts: load_components(parts[0], parts[1], device, config.precision)}
            watcher = watch(number, stage) if processes.first else NullCallback()
            trainer = open_trainer(stage.config, config, stage.run, watcher, loaded.get(parts), previous, processes)
            outcome = trainer.train()
            if not outcome.finished:
                return number, outcome
        previous = stage.run
    return len(stages), outcome


def _is_done(stage: Stage, last: bool) -> bool:
    """Whether a stage has ended. The last, on which no other has begun, goes on where it is to have more steps now."""
    done = stage.run.notes().get("finished_at_step")
    if done is None or not last:
        return done is not None
    return stage.config.minutes is not None or done >= stage.config.steps
