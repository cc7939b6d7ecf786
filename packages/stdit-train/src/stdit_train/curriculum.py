"""Resolve which run is meant, new or resumed, and train its stages in order.

In a curriculum every stage starts from the weights and the EMA that the one before ended with. Its folder holds
schedule.json and a run folder for each stage: 1-16x256/, 2-16x256-hq/, ...
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stdit_train.config.load import (
    CURRICULUM_FILE,
    flatten,
    from_dict,
    has_settings,
    load_curriculum,
    load_stage,
    read_curriculum,
    set_values,
    to_dict,
    write_curriculum,
)
from stdit_train.config.resolve import is_cached, resolve_config
from stdit_train.config.schema import TrainConfig
from stdit_train.errors import ConfigError

if TYPE_CHECKING:
    from stdit_train.callbacks import Callback, Outcome
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.components.load import Components
    from stdit_train.distributed.world import World

DEFAULT_STAGE = "demo"
NEWEST, AUTO = "newest", "auto"  # in place of a folder to resume


@dataclass(frozen=True)
class TrainOptions:
    """What the user asked for: a new run, or a run to resume.

    Attributes:
        stage: name of a stage. "demo", or what the resumed run is of, unless given.
        curriculum: name of a curriculum, instead of a stage.
        overrides: settings by dotted key, or by "STAGE/KEY" for one stage of a curriculum.
        out: folder of the run; one below `root` unless given.
        root: where run folders are made.
        resume: folder of the run to resume; `NEWEST`; or `AUTO`, which resumes the run in `out` if there is one.
    """

    stage: str | None = None
    curriculum: str | None = None
    overrides: Mapping[str, Any] | None = None
    out: Path | None = None
    root: Path = Path("runs")
    resume: str | None = None


class RunPlan(NamedTuple):
    """A run that is about to start: its folder and settings."""

    folder: Path
    curriculum: str | None  # its name; None for a single stage
    configs: list[TrainConfig]  # of each stage, in order
    resumed: bool = False  # whether it has been started before

    @property
    def runs(self) -> "list[RunFolder]":
        """Return the run folders of the stages."""
        from stdit_train.checkpoint.run_folder import RunFolder

        if self.curriculum is None:
            return [RunFolder(self.folder)]
        return [stage_folder(self.folder, number, config) for number, config in enumerate(self.configs, start=1)]

    @property
    def finished(self) -> bool:
        """Return whether all stages have ended, so that nothing is left to train."""
        last = len(self.configs)
        stages = enumerate(zip(self.configs, self.runs, strict=True), start=1)
        return all(_is_done(config, run, number == last) for number, (config, run) in stages)

    def save(self) -> None:
        """Create the folder of a curriculum and save its settings. A single stage saves its own when it starts."""
        if self.curriculum is not None:
            write_curriculum(self.folder, self.curriculum, self.configs)


class Stage(NamedTuple):
    """One stage of a run."""

    config: TrainConfig  # as asked for
    fitted: TrainConfig  # with the micro-batch that fits here
    run: "RunFolder"


def find_run(options: TrainOptions, *, demo_parts: bool = True) -> RunPlan:
    """Resolve the folder and the settings of the run that is asked for, new or resumed.

    Args:
        options: what is asked for.
        demo_parts: see `stdit_train.config.resolve.resolve_config`.

    Raises:
        ConfigError: settings that make no sense, or nothing to resume.
    """
    overrides = options.overrides or {}
    if options.resume == AUTO:
        if options.out is None:
            raise ConfigError("--resume auto needs the run's folder: give it with --out")
        new = find_run(replace(options, resume=None), demo_parts=demo_parts)
        started = any(has_settings(options.out / file) for file in ("config.json", CURRICULUM_FILE))
        return _same_run(new, _resumed_run(replace(options, resume=NEWEST), {})) if started else new
    if options.resume is not None:
        return _resumed_run(options, overrides)
    if options.curriculum is None:
        configs = [load_stage(options.stage or DEFAULT_STAGE, overrides)]
    else:
        configs = load_curriculum(options.curriculum, overrides)
    configs = [resolve_config(config, overrides, demo_parts=demo_parts) for config in configs]
    if options.out is not None:
        return RunPlan(options.out, options.curriculum, configs)
    from stdit_train.checkpoint.run_folder import free_run_folder

    folder = free_run_folder(options.root, options.curriculum or options.stage or DEFAULT_STAGE)
    return RunPlan(folder, options.curriculum, configs)


def _resumed_run(options: TrainOptions, overrides: Mapping[str, Any]) -> RunPlan:
    from stdit_train.checkpoint.run_folder import RunFolder, newest_run

    wanted = options.curriculum or options.stage
    if options.resume is None or options.resume == NEWEST:
        folder = options.out or newest_run(options.root, wanted or DEFAULT_STAGE)
    elif options.out is not None:
        raise ConfigError(f"--resume {options.resume} continues in its own folder: leave out --out")
    else:
        folder = Path(options.resume)
    if has_settings(folder.resolve().parent / CURRICULUM_FILE):
        raise ConfigError(f"{folder} is a stage of a curriculum: resume that with --resume {folder.parent}")
    if has_settings(folder / CURRICULUM_FILE):
        saved = read_curriculum(folder, {})[1]
        curriculum, configs = read_curriculum(folder, overrides)
        kind, found = f"the curriculum {curriculum}", curriculum if options.curriculum else None
    else:
        values = RunFolder(folder).read_config()
        saved = [from_dict(values)]
        curriculum, configs = None, [from_dict(set_values(values, overrides))]
        kind, found = f"the stage {configs[0].stage}", configs[0].stage if options.stage else None
    if wanted is not None and found not in (wanted, Path(wanted).stem):
        option = "curriculum" if options.curriculum else "stage"
        raise ConfigError(f"{folder} is of {kind}: leave out --{option} {wanted}")
    for theirs, ours in zip(saved, configs, strict=True):
        # frozen weights may have moved: they are compared when they are loaded
        if ours.init != theirs.init and not theirs.partial:
            raise ConfigError(f"--resume continues with the weights of {folder}: leave out --init {ours.init}")
    plan = RunPlan(folder, curriculum, configs, resumed=True)
    for config, run in zip(configs, plan.runs, strict=True):
        _check_budget(config, run)
    return plan


def _same_run(new: RunPlan, saved: RunPlan) -> RunPlan:
    """Return the plan that resumes a saved run, which must have the settings of the new one, except for its length.

    Raises:
        ConfigError: another setting differs; the message names the first.
    """
    hint = "choose another folder with --out, or resume it as it is with --resume"
    if new.curriculum != saved.curriculum or len(new.configs) != len(saved.configs):
        raise ConfigError(f"{saved.folder} holds a run of other stages: {hint}")
    configs = [
        replace(
            ours,
            draw=theirs.draw,
            # what an older version chose for a setting that is left to us stays
            replicate=theirs.replicate if ours.replicate is None else ours.replicate,
            reduce_once=theirs.reduce_once if ours.reduce_once is None else ours.reduce_once,
        )
        for theirs, ours in zip(saved.configs, new.configs, strict=True)
    ]
    for theirs, ours in zip(saved.configs, configs, strict=True):
        if theirs != replace(ours, steps=theirs.steps, minutes=theirs.minutes):
            left, right = flatten(to_dict(theirs)), flatten(to_dict(ours))
            key = next(key for key in right if left.get(key) != right[key] and key not in ("steps", "minutes"))
            raise ConfigError(
                f"{saved.folder} holds a run with other settings ({key}: {left.get(key)}, now {right[key]}): {hint}"
            )
    new = new._replace(configs=configs, resumed=True)
    for config, run in zip(new.configs, new.runs, strict=True):
        _check_budget(config, run)
    return new


def _check_budget(config: TrainConfig, run: "RunFolder") -> None:
    """Check that a run is resumed with at least the steps and minutes that it has had.

    Raises:
        ConfigError: it is not, or it is to go on after its end but has no checkpoint any more.
    """
    if not has_settings(run.config_file):
        return  # a stage that has not begun
    (step, seconds), ended = run.reached(), run.metadata().get("finished_at_step", 0)
    step = max(step, ended)
    if config.steps < step:
        raise ConfigError(f"{run.path} has done {step} steps, --steps {config.steps} is less: give more than {step}")
    saved = from_dict(run.read_config())
    limit = config.minutes if config.minutes != saved.minutes else None
    if limit is not None and seconds > 60.0 * limit:
        done = f"{seconds / 60.0:.1f} minutes"
        raise ConfigError(f"{run.path} has trained for {done}, --minutes {limit:g} is less: give more")
    if ended and not run.has_checkpoint and (config.steps, config.minutes) != (saved.steps, saved.minutes):
        raise ConfigError(
            f"{run.path} ended at step {ended} and has no checkpoint any more: start a new run from its weights with "
            f"--init {run.path}"
        )


def stage_folder(folder: Path, number: int, config: TrainConfig) -> "RunFolder":
    """Return the run folder of a curriculum's stage, numbered from 1."""
    from stdit_train.checkpoint.run_folder import RunFolder

    return RunFolder(folder / f"{number}-{config.stage}")


def train_stages(
    stages: Sequence[Stage], watch: "Callable[[int, Stage], Callback]", world: "World | None" = None
) -> "tuple[int, Outcome | None]":
    """Train the stages that are not finished, each from its last checkpoint where it has one.

    Args:
        stages: in order.
        watch: makes the callback of a stage, numbered from 1.
        world: processes of the run. [default: this one]

    Returns:
        The number of the stage that ended last and how it ended, None if all had been finished before. It is not
        `finished` if an interruption leaves stages to train.

    Raises:
        RunEnded: a stage can't go on.
    """
    from stdit_train.build import open_trainer
    from stdit_train.callbacks import NullCallback
    from stdit_train.components.load import load_components
    from stdit_train.distributed.world import World

    world = world or World()
    device, loaded = world.device(), dict[tuple[str, str, str], "Components"]()
    outcome, previous = None, None
    for number, stage in enumerate(stages, start=1):
        if not world.broadcast_from_main(partial(_is_done, stage.config, stage.run, number == len(stages))):
            config = stage.fitted
            parts = config.data.vae, config.data.text_encoder, config.precision
            if config.network == "stdit" and not is_cached(config) and parts not in loaded:
                loaded = {parts: load_components(parts[0], parts[1], device, config.precision)}
            watcher = watch(number, stage) if world.is_main else NullCallback()
            trainer = open_trainer(stage.config, config, stage.run, watcher, loaded.get(parts), previous, world)
            outcome = trainer.train()
            if not outcome.finished or (outcome.interrupted and number < len(stages)):
                return number, replace(outcome, finished=False)
        previous = stage.run
    return len(stages), outcome


def _is_done(config: TrainConfig, run: "RunFolder", last: bool) -> bool:
    """Return whether a stage has ended. The last stage to have started continues if it is given more steps."""
    done = run.metadata().get("finished_at_step")
    if done is None or not last:
        return done is not None
    if done >= config.steps:
        return True
    return config.minutes is not None and (not run.has_checkpoint or run.reached()[1] >= 60.0 * config.minutes)
