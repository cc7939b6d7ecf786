"""`stdit train`: parse, call, show."""

from pathlib import Path
from typing import Annotated

import typer

RUNS = Path("runs")


def train(
    stage: Annotated[
        str | None, typer.Option(help="Which stage; `stdit stages` lists them.", show_default="demo")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Stages in a row, each from the weights of the one before; `stdit stages`.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder of videos with captions, or a manifest; the built-in set unless given.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<stage or schedule> unless given.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[RUN]", help="Go on with this run; without RUN with the newest of the stage."),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Weights to start from: a pipeline, run or model folder, .pth file or hub id.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="seq, parallel, dit or latte.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time budget: the schedule is fitted to it.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and noise.")] = None,
    vae: Annotated[str | None, typer.Option(help="VAE: a folder, hub id, or `demo`.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="T5 encoder: a folder, hub id, or `demo`.")] = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, one a GPU; several machines take torchrun.")
    ] = 1,
    profile: Annotated[bool, typer.Option("--profile", help="Trace three steps into the run's profile/.")] = False,
    wandb: Annotated[str | None, typer.Option(metavar="PROJECT", help="Log to Weights & Biases as well.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting, as optimizer.lr=1e-4; STAGE/KEY=VALUE for one stage.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run and what it takes; train nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start even if the run can't fit into memory.")] = False,
) -> None:
    """Train a stage or a schedule. A run's folder holds settings, losses, samples, checkpoints and the pipeline."""
    if stage is not None and schedule is not None:
        raise ValueError("--stage and --schedule both say what to train: give one")
    from stdit_cli.training import TrainRequest, run_training
    from stdit_train.config.load import parse_overrides
    from stdit_train.curriculum import TrainOptions

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
        "profile": 3 if profile else None,
    }
    given = {key: value for key, value in named.items() if value is not None}
    overrides = {**given, **parse_overrides(setting or [])}
    options = TrainOptions(stage, schedule, overrides, out, RUNS, resume)
    run_training(TrainRequest(options, dry_run, force, nproc))
