"""`stdit train`: its options."""

from pathlib import Path
from typing import Annotated

import typer

PROFILED_STEPS = 3


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
        from stdit_cli.commands.train.dry_run import show_dry_run

        show_dry_run(options, nproc, gpu, verbose=verbose, as_json=as_json)
    else:
        from stdit_cli.commands.train.run import TrainRequest, run_training

        run_training(TrainRequest(options, force, nproc))
