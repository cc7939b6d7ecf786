"""`stdit train`: train a stage, or stages in a row."""

import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.config.schema import TrainConfig
    from stdit_train.curriculum import RunPlan, Stage, TrainOptions
    from stdit_train.distributed.world import World

ENDED = 1  # exit code of a run that could not go on
PROFILED_STEPS = 3


@dataclass(frozen=True)
class TrainRequest:
    """The options of `stdit train`."""

    options: "TrainOptions"
    force: bool
    nproc: int


def train(
    stage: Annotated[
        str | None, typer.Option(help="Stage to train; `stdit stages` lists them.", show_default="demo")
    ] = None,
    curriculum: Annotated[
        str | None,
        typer.Option(
            "--curriculum",
            "--schedule",
            help="Stages to train in a row, each from the weights of the one before; `stdit stages` lists them.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of videos with captions, manifest, or latent cache.", show_default="the embedded set `shapes`"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/STAGE or runs/CURRICULUM")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[RUN]", help="Resume the run in this folder; without RUN the newest of the stage."),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Weights to start from: a pipeline, run or model folder, .pth file or hub id.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Attention variant: seq, parallel, dit or latte.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time budget in minutes, which the learning-rate schedule is fitted to.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step, over all processes.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for weights, data order and noise.")] = None,
    vae: Annotated[str | None, typer.Option(help="VAE: a folder, hub id, or `demo`.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="T5 encoder: a folder, hub id, or `demo`.")] = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, one per GPU. Several machines need torchrun.")
    ] = 1,
    profile: Annotated[
        bool, typer.Option("--profile", help=f"Trace {PROFILED_STEPS} steps into profile/ of the run folder.")
    ] = False,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Weights & Biases project to log to as well.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting, e.g. optimizer.lr=1e-4; STAGE/KEY=VALUE for one stage of a curriculum.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the model, its memory, FLOPs and time, and train nothing.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: h200, h100, a100, 4090, or cpu for this machine.", show_default="this machine"
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="With --dry-run: show all settings as well.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print estimate and settings as JSON.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if the run does not fit into memory.")] = False,
) -> None:
    """Train a stage or a curriculum into a run folder: settings, losses, samples, checkpoints and the pipeline."""
    from stdit_train.config.load import parse_overrides
    from stdit_train.curriculum import TrainOptions
    from stdit_train.errors import ConfigError

    if stage is not None and curriculum is not None:
        raise ConfigError("--stage and --curriculum both say what to train: give one")
    if not dry_run and (gpu is not None or verbose or as_json):
        raise ConfigError("--gpu, --verbose and --json go with --dry-run")
    named = {
        "data.source": data,
        "init": init,
        "model.variant": variant,
        "steps": steps,
        "minutes": minutes,
        "global_batch": batch,
        "seed": seed,
        "data.vae": vae,
        "data.text_encoder": text_encoder,
        "wandb": wandb,
        "profile": PROFILED_STEPS if profile else None,
    }
    overrides = {key: value for key, value in named.items() if value is not None}
    overrides |= parse_overrides(setting or [])
    options = TrainOptions(stage, curriculum, overrides, out, resume=resume)
    if dry_run:
        show_dry_run(options, nproc, gpu, verbose=verbose, as_json=as_json)
    else:
        run_training(TrainRequest(options, force, nproc))


def run_training(request: TrainRequest) -> None:
    """Resolve the settings, check that the run fits, train, and print what came out.

    Every process of a run comes here; rank 0 resolves, prints and writes.
    """
    from stdit_cli.console import plain_console
    from stdit_train.curriculum import find_run
    from stdit_train.distributed.world import World

    console = plain_console()
    # A wrong setting is told before torch is imported; of many processes rank 0 alone looks.
    plan = find_run(request.options) if World.from_env().size == 1 else None
    if plan is not None and request.nproc > 1:
        code = launch_processes(console, request, plan)
    else:
        with World.from_env() as world:
            console.quiet = not world.is_main
            code = train_here(console, request, plan, world)
    if code:
        raise typer.Exit(code)


def train_here(console: "Console", request: TrainRequest, plan: "RunPlan | None", world: "World") -> int:
    """Train as one process of a run, and return the exit code.

    Args:
        console: of rank 0; quiet on the others.
        request: the options.
        plan: the run, unless rank 0 is still to resolve it.
        world: the processes.
    """
    from stdit_cli.console import INTERRUPTED, TrainingBar
    from stdit_train.curriculum import Stage, train_stages
    from stdit_train.errors import RunEnded

    folder, curriculum, stages = world.broadcast_from_main(lambda: prepare(console, request, plan, world.size))
    with ExitStack() as bars:

        def watch(number: int, stage: Stage) -> TrainingBar:
            bars.close()
            if curriculum is not None:
                console.print(f"stage {number} of {len(stages)}")
            announce(console, stage.config, stage.run)
            return bars.enter_context(TrainingBar(console))

        try:
            number, outcome = train_stages(stages, watch, world)
        except RunEnded as error:
            bars.close()
            console.print(f"stdit: {error}")
            console.print(f"go on with: {resume_command(folder, request.nproc)}", soft_wrap=True)
            raise typer.Exit(ENDED) from error
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


def prepare(
    console: "Console", request: TrainRequest, plan: "RunPlan | None", processes: int
) -> "tuple[Path, str | None, list[Stage]]":
    """Check a run and choose its micro-batches; return its folder, its curriculum's name and its stages."""
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.components.load import check_sources
    from stdit_train.curriculum import Stage, find_run
    from stdit_train.estimate.training import fit_to_memory
    from stdit_train.tracking.metrics import check_wandb

    plan = plan or find_run(request.options)
    if request.options.resume is None:
        RunFolder(plan.folder).check_free()
    check_wandb(next((config.wandb for config in plan.configs if config.wandb), None))
    stages = []
    for config, run in zip(plan.configs, plan.runs, strict=True):
        check_sources(config)
        fit = fit_to_memory(config, processes, micro_batch=run.metadata().get("micro_batch"), force=request.force)
        for line in fit.notes:
            console.print(line)
        stages.append(Stage(config, fit.config, run))
    if plan.curriculum is not None:
        console.print(f"curriculum {plan.curriculum}: {', then '.join(config.stage for config in plan.configs)}")
    plan.save()
    return plan.folder, plan.curriculum, stages


def launch_processes(console: "Console", request: TrainRequest, plan: "RunPlan") -> int:
    """Run this command in several processes, once they can share the run; return the exit code."""
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.distributed.launch import launch
    from stdit_train.distributed.mesh import parallel_dims

    if request.options.resume is None:
        RunFolder(plan.folder).check_free()
    for config in plan.configs:
        parallel_dims(config, request.nproc)
    ended = launch(request.nproc, [sys.executable, "-m", "stdit_cli", *sys.argv[1:]])
    if ended.message is not None:
        typer.echo(f"stdit: {ended.message}", err=True)
        if plan.folder.exists():
            console.print(f"go on with: {resume_command(plan.folder, request.nproc)}", soft_wrap=True)
    return ended.code


def resume_command(folder: Path, nproc: int = 1) -> str:
    """Return the command that resumes a run."""
    return f"stdit train --resume {shlex.quote(str(folder))}" + (f" --nproc {nproc}" if nproc > 1 else "")


def announce(console: "Console", config: "TrainConfig", run: "RunFolder") -> None:
    """Print what is about to be trained: model, clips, components, run folder."""
    from stdit_train.assets import DEMO

    data = config.data
    clips = f"{data.frames}x{data.height}x{data.width}"
    source = "the embedded set `shapes` (--data FOLDER trains on videos)" if data.source == "shapes" else data.source
    console.print(f"stage {config.stage}: {config.model.preset} {config.model.variant}, {clips}, on {source}")
    options = {"VAE": (data.vae, "--vae"), "text encoder": (data.text_encoder, "--text-encoder")}
    bundled = {name: option for name, (source, option) in options.items() if source == DEMO}
    if bundled:
        console.print(f"with the demo's {' and '.join(bundled)}; choose others with {' and '.join(bundled.values())}")
    console.print(f"run folder: {run.path}")


def show_dry_run(options: "TrainOptions", nproc: int, gpu: str | None, *, verbose: bool, as_json: bool) -> None:
    """Print for each stage what it takes, as a table or as JSON, from formulas: nothing is allocated."""
    import json

    from rich.box import SIMPLE
    from rich.table import Table

    from stdit_cli.console import plain_console
    from stdit_train.assets import DEMO
    from stdit_train.config.load import to_dict
    from stdit_train.curriculum import find_run
    from stdit_train.distributed.mesh import parallel_dims
    from stdit_train.estimate.plan import dry_run
    from stdit_train.estimate.training import estimate_run

    console, reports = plain_console(), []
    published = find_run(options, demo_parts=False).configs
    for config, started in zip(published, find_run(options).configs, strict=True):
        report = dry_run(config, nproc, gpu)
        notes = report.notes
        if started.data != config.data:
            count = estimate_run(started, dims=parallel_dims(started, nproc)).parameters
            sources = {"VAE": started.data.vae, "text encoder": started.data.text_encoder}
            names = " and ".join(name for name, source in sources.items() if source == DEMO)
            notes.append(
                f"without --data the embedded set `shapes` stands in, with the demo's {names}: {count:,} parameters"
            )
        reports.append({**report.to_dict(), "notes": notes, "settings": to_dict(started)})
        if as_json:
            continue
        table = Table(box=SIMPLE, show_header=False, padding=(0, 2, 0, 0))
        for name, value in report.rows.items():
            table.add_row(name, value)
        console.print(table)
        for note in notes:
            console.print(note)
        if verbose:
            console.print_json(json.dumps(to_dict(started)))
    if as_json:
        typer.echo(json.dumps(reports, indent=1))
