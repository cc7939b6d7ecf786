"""What `stdit train` shows: lines before the run, a progress bar along it, a summary after it."""

import os
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from typer import Exit

from stdit_cli.console import INTERRUPTED, TrainingBar, plain_console
from stdit_train.assets import resolve
from stdit_train.checkpoint.run_folder import RunFolder, free_run_folder, newest_run
from stdit_train.config.load import ConfigError, from_dict, load_stage, parse_overrides, set_values, to_dict
from stdit_train.config.schema import TrainConfig

if TYPE_CHECKING:
    from stdit_train.distributed.world import World

__all__ = ["Request", "run_training", "with_demo_parts"]
NEWEST = "newest"  # what a bare --resume stands for
ENDED = 1  # exit code of a run that could not go on


@dataclass(frozen=True)
class Request:
    """The options of `stdit train`."""

    stage: str | None
    schedule: str | None
    named: dict[str, Any]
    settings: list[str]
    out: Path | None
    root: Path
    resume: str | None
    dry_run: bool
    force: bool
    nproc: int = 1


def run_training(request: Request) -> None:
    """Resolve the configuration, check that it fits, train, and say what came out.

    Every process of a run comes here; the first decides what they do, prints and writes.
    """
    from stdit_train.distributed._distributed import join

    console = plain_console()
    overrides = {**request.named, **parse_overrides(request.settings)}
    if request.dry_run:
        for config in resolved(request, overrides)[2]:
            show_plan(console, config, request.nproc)
        return
    if request.nproc > 1 and "RANK" not in os.environ:
        code = launched(console, request, overrides)
    else:
        with join() as processes:
            console.quiet = not processes.first
            code = trained(console, request, overrides, processes)
    if code:
        raise Exit(code)


def trained(console: Console, request: Request, overrides: dict[str, Any], processes: "World") -> int:
    """This process's part of a run, or of a schedule; the exit code."""
    from stdit_train.config.load import write_schedule
    from stdit_train.curriculum import Stage, stage_folder, train_stages
    from stdit_train.errors import RunEnded
    from stdit_train.tracking.metrics import check_wandb

    def prepare() -> tuple[Path, str | None, list[Stage]]:
        folder, name, configs = resolved(request, overrides)
        runs = [RunFolder(folder)] if name is None else [stage_folder(folder, i, c) for i, c in enumerate(configs, 1)]
        if request.resume is None:
            RunFolder(folder).check_free()
        check_wandb(next((config.wandb for config in configs if config.wandb), None))
        pairs = list(zip(configs, runs, strict=True))
        fits = [fitted(console, config, run, request.force, processes.count) for config, run in pairs]
        if name is not None:
            console.print(f"schedule {name}: {', then '.join(config.stage for config in configs)}")
            write_schedule(folder, name, configs)
        return folder, name, [Stage(*parts) for parts in zip(configs, fits, runs, strict=True)]

    folder, name, stages = processes.decided(prepare)
    with ExitStack() as bars:

        def watch(number: int, stage: Stage) -> TrainingBar:
            bars.close()
            if name is not None:
                console.print(f"stage {number} of {len(stages)}")
            announce(console, stage.config, stage.run)
            return bars.enter_context(TrainingBar(console))

        try:
            number, outcome = train_stages(stages, watch, processes)
        except RunEnded as error:
            bars.close()
            console.print(f"stdit: {error}")
            console.print(f"go on with: {resume_command(folder, request.nproc)}", soft_wrap=True)
            raise Exit(ENDED) from error
    run = stages[number - 1].run
    if outcome is not None and not outcome.finished:
        command = resume_command(folder, request.nproc)
        console.print(f"stopped at step {outcome.step}, saved. Go on with: {command}", soft_wrap=True)
        return 128 + outcome.signal if outcome.signal else INTERRUPTED
    steps = f"{outcome.step} steps" if outcome else "nothing left to do"
    console.print(f"done: {steps}. Losses in {run.loss_plot}, samples in {run.samples}")
    console.print(
        f'try it: stdit sample "a red circle moving left" --checkpoint {shlex.quote(str(run.path))}', soft_wrap=True
    )
    return 0


def launched(console: Console, request: Request, overrides: dict[str, Any]) -> int:
    """The same in several processes, once it is known that the run can be shared by them; the exit code."""
    from stdit_cli.main import work
    from stdit_train.distributed.launch import launch
    from stdit_train.distributed.mesh import parallel_dims

    folder, _, configs = resolved(request, overrides)
    if request.resume is None:
        RunFolder(folder).check_free()
    for config in configs:
        parallel_dims(config, request.nproc)
    ended = launch(request.nproc, work, sys.argv)
    if ended.said is not None:
        print(f"stdit: {ended.said}", file=sys.stderr)
        if folder.exists():
            console.print(f"go on with: {resume_command(folder, request.nproc)}", soft_wrap=True)
    return ended.code


def resolved(request: Request, overrides: dict[str, Any]) -> tuple[Path, str | None, list[TrainConfig]]:
    """The folder, the schedule's name (None for a single stage) and the configurations."""
    from stdit_train.config.load import SCHEDULE_FILE, load_schedule, read_schedule

    wanted = request.schedule or request.stage
    root_name = wanted or "demo"
    if request.resume is None:
        folder = request.out or free_run_folder(request.root, root_name)
        if request.schedule is None:
            return folder, None, [with_demo_parts(load_stage(root_name, overrides), overrides)]
        configs = load_schedule(request.schedule, overrides)
        return folder, request.schedule, [with_demo_parts(config, overrides) for config in configs]
    if request.resume == NEWEST:
        folder = request.out or newest_run(request.root, root_name)
    elif request.out is not None:
        raise ConfigError(f"--resume {request.resume} goes on in its own folder: leave out --out")
    else:
        folder = Path(request.resume)
    if (folder.resolve().parent / SCHEDULE_FILE).is_file():
        raise ConfigError(f"{folder} is a stage of a schedule: --resume {folder.parent} goes on with it")
    if (folder / SCHEDULE_FILE).is_file():
        name, configs = read_schedule(folder, overrides)
        kind, found = f"the schedule {name}", name if request.schedule else None
    else:
        configs, name = [from_dict(set_values(RunFolder(folder).read_config(), overrides))], None
        kind, found = f"the stage {configs[0].stage}", configs[0].stage if request.stage else None
    if wanted is not None and found not in (wanted, Path(wanted).stem):
        raise ConfigError(f"{folder} is of {kind}: leave out --{'schedule' if request.schedule else 'stage'} {wanted}")
    return folder, name, configs


def resume_command(folder: Path, nproc: int = 1) -> str:
    """What goes on with a run."""
    return f"stdit train --resume {shlex.quote(str(folder))}" + (f" --nproc {nproc}" if nproc > 1 else "")


def with_demo_parts(config: TrainConfig, overrides: dict[str, Any]) -> TrainConfig:
    """`shapes` goes with the demo's own VAE and text encoder unless others are named; "demo" becomes its folder."""
    if config.data.source != "shapes":
        from stdit_train.config.resolve import with_cached_parts

        config = with_cached_parts(config, overrides)
    values = to_dict(config)
    for part in ("vae", "text_encoder"):
        named = overrides.get(f"data.{part}")
        if config.data.source == "shapes" and named is None:
            values["data"][part] = "demo"
        values["data"][part] = resolve(values["data"][part])
    if config.data.source != "shapes":
        values["data"]["remember_latents"] = False  # clips start at random places: no two epochs see the same frames
    return from_dict(values)


def announce(console: Console, config: TrainConfig, run: RunFolder) -> None:
    """What is about to happen, a line each."""
    demo = resolve("demo")
    data = config.data
    clips = f"{data.frames}x{data.height}x{data.width}"
    source = "the embedded set `shapes` (--data FOLDER trains on videos)" if data.source == "shapes" else data.source
    console.print(f"stage {config.stage}: {config.model.preset} {config.model.variant}, {clips}, on {source}")
    bundled = [name for name, part in (("VAE", data.vae), ("text encoder", data.text_encoder)) if part == demo]
    if bundled:
        options = {"VAE": "--vae", "text encoder": "--text-encoder"}
        others = " and ".join(options[name] for name in bundled)
        take = "take others" if len(bundled) > 1 else "takes another"
        console.print(f"with the demo's {' and '.join(bundled)}; {others} {take}")
    console.print(f"run folder: {run.path}")


def show_plan(console: Console, config: TrainConfig, nproc: int = 1) -> None:
    """The resolved configuration and what the run takes, on each process."""
    import json

    from stdit_train.distributed.mesh import parallel_dims
    from stdit_train.estimate.training import describe, estimate_run, refusal
    from stdit_train.hardware import available_memory

    available = available_memory()
    estimate = estimate_run(config, available, parallel_dims(config, nproc))
    console.print_json(json.dumps(to_dict(config)))
    for line in describe(estimate):
        console.print(line)
    console.print(refusal(estimate, available) or "fits here")


def fitted(console: Console, config: TrainConfig, run: RunFolder, force: bool, processes: int = 1) -> TrainConfig:
    """The configuration with the micro-batch that fits here, or that the run has had so far; refused, before anything
    is allocated, if none does."""
    from stdit_train.distributed.mesh import parallel_dims
    from stdit_train.estimate.training import estimate_run, refusal, with_micro_batch
    from stdit_train.hardware import available_memory

    available = available_memory()
    if config.micro_batch is None:
        config = replace(config, micro_batch=run.notes().get("micro_batch"))
    grouping = parallel_dims(config, processes)
    estimate = estimate_run(config, available, grouping)
    message = refusal(estimate, available)
    if message and not force:
        raise ConfigError(f"{message} (--force starts all the same)")
    if message:
        console.print(f"warning: {message}; started all the same")
    if processes > 1:
        console.print(
            f"{processes} processes: {grouping.replicate} x the weights in {grouping.shard} shards, "
            f"{grouping.sequence} to a clip; batch {config.global_batch} shared by {grouping.data}"
        )
    if estimate.accumulation > 1:
        parts = config.global_batch // estimate.micro_batch
        console.print(
            f"stage {config.stage}: batch {config.global_batch} as {parts} parts of {estimate.micro_batch}, accumulated"
        )
    return with_micro_batch(config, estimate)
