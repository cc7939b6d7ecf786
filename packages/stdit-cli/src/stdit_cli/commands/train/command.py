"""`stdit train`: its options."""

from pathlib import Path
from typing import Annotated

import typer

from stdit_cli import completion

PROFILED_STEPS = 3
RUN, DATA, SETTINGS, MACHINE, DRY_RUN = "Run", "Data", "Settings", "Machine and logging", "Dry run"


def train(
    stage: Annotated[
        str | None,
        typer.Option(
            help="Stage to train; `stdit stages` lists them.",
            show_default="demo",
            autocompletion=completion.stages,
            rich_help_panel=RUN,
        ),
    ] = None,
    curriculum: Annotated[
        str | None,
        typer.Option(
            "--curriculum",
            "--schedule",
            help="Curriculum: stages in order, each from the weights of the one before; `stdit stages` lists them.",
            autocompletion=completion.curricula,
            rich_help_panel=RUN,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="TOML file of settings that override the stage's; other options override the file's.",
            rich_help_panel=RUN,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of videos with captions, manifest, or latent cache.",
            show_default="the embedded set `shapes`",
            rich_help_panel=DATA,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/STAGE or runs/CURRICULUM", rich_help_panel=RUN)
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[RUN|auto]",
            help="Resume the run in this folder; without RUN, the newest run of the stage. `auto` resumes the run in "
            "--out if there is one, and starts it otherwise.",
            rich_help_panel=RUN,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Weights to start from: a pipeline, run or model folder, .pth file, Hub id or `demo`.",
            rich_help_panel=RUN,
        ),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK",
            help="Train a LoRA adapter of this rank for the model of --init, whose weights stay as they are.",
            rich_help_panel=RUN,
        ),
    ] = None,
    lora_modules: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Parts of a block to adapt: attn, attn_temp, cross_attn, mlp, or one layer as attn.qkv.",
            show_default="all attention",
            rich_help_panel=RUN,
        ),
    ] = None,
    train_: Annotated[
        str | None,
        typer.Option(
            "--train",
            metavar="all|temporal",
            help="Weights to train: all, or the temporal attention of the model of --init alone.",
            show_default="all",
            autocompletion=completion.choices("all", "temporal"),
            rich_help_panel=RUN,
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Attention variant: seq, parallel, dit or latte.",
            show_default="the stage's",
            autocompletion=completion.variants,
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps.", show_default="the stage's", rich_help_panel=RUN)
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Time budget in minutes; the learning-rate schedule is fitted to it.", rich_help_panel=RUN),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Samples per step, over all processes.", show_default="the stage's", rich_help_panel=DATA),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed for weights, data order and noise.", show_default="the stage's", rich_help_panel=SETTINGS
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="VAE: a folder, Hub id or `demo`.", show_default="as data and stage need", rich_help_panel=DATA
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            help="T5 encoder: a folder, Hub id or `demo`.", show_default="as data and stage need", rich_help_panel=DATA
        ),
    ] = None,
    nproc: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes on this machine, one per GPU. Several machines need torchrun.",
            rich_help_panel=MACHINE,
        ),
    ] = 1,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help=f"Trace {PROFILED_STEPS} steps into profile/ of the run folder.", rich_help_panel=MACHINE
        ),
    ] = False,
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Weights & Biases project to log to.", rich_help_panel=MACHINE)
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting, e.g. optimizer.lr=1e-4; STAGE/KEY=VALUE for one stage of a curriculum.",
            autocompletion=completion.settings,
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show the model, its memory, FLOPs and time, and train nothing.", rich_help_panel=DRY_RUN
        ),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: h200, h100, a100, 4090, cpu for this machine, or any card as 24GB,80TFLOPS.",
            show_default="this machine",
            autocompletion=completion.gpus,
            rich_help_panel=DRY_RUN,
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --dry-run: show all settings as well.", rich_help_panel=DRY_RUN)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="With --dry-run: print estimate and settings as JSON.", rich_help_panel=DRY_RUN),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start even if the run does not fit into memory.", rich_help_panel=MACHINE)
    ] = False,
) -> None:
    """Train a stage or a curriculum into a run folder: settings, losses, samples, checkpoints and the pipeline."""
    from stdit_train.assets import named_source
    from stdit_train.config.load import parse_overrides, read_own_settings
    from stdit_train.curriculum import TrainOptions
    from stdit_train.errors import ConfigError

    if stage is not None and curriculum is not None:
        raise ConfigError("--stage and --curriculum both say what to train: give one")
    if not dry_run and (gpu is not None or verbose or as_json):
        raise ConfigError("--gpu, --verbose and --json go with --dry-run")
    own = read_own_settings(config) if config is not None else {}
    base = own.pop("stage", None)
    if curriculum is not None and base is not None:
        raise ConfigError(f"--config {config} names the stage {base}, which --curriculum leaves no room for: remove it")
    named = {
        "data.source": data,
        "init": None if init is None else named_source(init),
        "lora.rank": lora,
        "lora.modules": None if lora_modules is None else [name.strip() for name in lora_modules.split(",")],
        "trained_weights": train_,
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
    overrides = own | {key: value for key, value in named.items() if value is not None}
    overrides |= parse_overrides(setting or [])
    options = TrainOptions(stage or base, curriculum, overrides, out, resume=resume)
    if dry_run:
        from stdit_cli.commands.train.dry_run import show_dry_run

        show_dry_run(options, nproc, gpu, verbose=verbose, as_json=as_json)
    else:
        from stdit_cli.commands.train.run import TrainRequest, run_training

        run_training(TrainRequest(options, force, nproc))
