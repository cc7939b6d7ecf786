"""Schedules: stages that follow one another, each from the weights and the average that the one before ended with.

A schedule's folder holds schedule.json and a run folder for each stage: 1-16x256/, 2-16x256-hq/, ...
"""

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from stdit_train.build import open_trainer
from stdit_train.callbacks import Outcome, Unwatched, Watcher
from stdit_train.checkpoint.run_folder import SCHEDULE_FILE, RunFolder, read_settings
from stdit_train.components.load import Components, load_components
from stdit_train.config.load import ConfigError, TrainConfig, flat, from_dict, like, set_values, stage_values, to_dict
from stdit_train.data.cached import is_cached
from stdit_train.distributed.world import Processes
from stdit_train.tracking.metrics import replace_text

FILE = SCHEDULE_FILE


class Stage(NamedTuple):
    """One run of several, or the only one."""

    config: TrainConfig  # as asked for
    fitted: TrainConfig  # with the micro-batch that fits here
    run: RunFolder


def schedule_names() -> list[str]:
    """The schedules that there are."""
    folder = resources.files("stdit_train.config").joinpath("curricula")
    return sorted(path.name.removesuffix(".toml") for path in folder.iterdir())


def schedule_about(name: str) -> str:
    """What a schedule does, in one line."""
    return _read(name)["about"]


def load_schedule(name: str, overrides: Mapping[str, Any] | None = None) -> list[TrainConfig]:
    """The configurations of a schedule's stages, in order.

    Args:
        name: of the schedule.
        overrides: by dotted key for all stages, or by "STAGE/KEY" for one.

    Raises:
        ConfigError: no such schedule, stage or key, or a value of the wrong type.
    """
    entries = _read(name)["stage"]
    _check_stages(name, [entry["name"] for entry in entries], overrides or {})
    configs = []
    for number, entry in enumerate(entries):
        own = {key: value for key, value in entry.items() if key not in ("name", "from")}
        values = stage_values(entry.get("from", entry["name"]))
        values = set_values(values, flat(own)) | {"stage": entry["name"]}
        config = from_dict(set_values(values, _for_stage(overrides or {}, entry["name"])))
        if number and config.init is not None:  # what --init gives is for the first; the others are handed theirs
            config = from_dict(to_dict(config) | {"init": None})
        configs.append(config)
    return configs


def write_schedule(folder: Path, name: str, configs: Sequence[TrainConfig]) -> None:
    """Make a schedule's folder, or save its changed settings."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"schedule": name, "stages": [to_dict(config) for config in configs]}
    replace_text(folder / FILE, json.dumps(values, indent=1) + "\n")


def read_schedule(folder: Path, overrides: Mapping[str, Any]) -> tuple[str, list[TrainConfig]]:
    """Name and configurations of a schedule that was started, with overrides (see `load_schedule`).

    Raises:
        ConfigError: no such stage or key, or a value of the wrong type.
    """
    saved = read_settings(folder / FILE)
    _check_stages(saved["schedule"], [values["stage"] for values in saved["stages"]], overrides)
    configs = [from_dict(set_values(values, _for_stage(overrides, values["stage"]))) for values in saved["stages"]]
    return saved["schedule"], configs


def stage_folder(folder: Path, number: int, config: TrainConfig) -> RunFolder:
    """The run folder of a schedule's stage, numbered from 1."""
    return RunFolder(folder / f"{number}-{config.stage}")


def train_stages(
    stages: Sequence[Stage], watch: Callable[[int, Stage], Watcher], processes: Processes | None = None
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
    processes = processes or Processes()
    device, loaded = processes.device(), dict[tuple[str, str, str], Components]()
    outcome, previous = None, None
    for number, stage in enumerate(stages, start=1):
        if len(stages) == 1 or not processes.decided(partial(_is_done, stage, number == len(stages))):
            config = stage.fitted
            parts = config.data.vae, config.data.text_encoder, config.precision
            if not is_cached(config) and parts not in loaded:
                loaded = {parts: load_components(parts[0], parts[1], device, config.precision)}
            watcher = watch(number, stage) if processes.first else Unwatched()
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


def _read(name: str) -> dict[str, Any]:
    if name not in schedule_names():
        known = schedule_names()
        raise ConfigError(f"unknown schedule {name!r}: choose one of {', '.join(known)}{like(name, known)}")
    return tomllib.loads(resources.files("stdit_train.config").joinpath("curricula", f"{name}.toml").read_text())


def _check_stages(name: str, stages: list[str], overrides: Mapping[str, Any]) -> None:
    for key in overrides:
        stage, slash, _ = key.rpartition("/")
        if slash and stage not in stages:
            known = ", ".join(stages)
            raise ConfigError(
                f"--set {key}: schedule {name} has no stage {stage!r}{like(stage, stages)}; it has {known}"
            )


def _for_stage(overrides: Mapping[str, Any], stage: str) -> dict[str, Any]:
    own = {key.removeprefix(f"{stage}/"): value for key, value in overrides.items() if key.startswith(f"{stage}/")}
    return {key: value for key, value in overrides.items() if "/" not in key} | own
