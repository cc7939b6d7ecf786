"""`stdit weights inspect`, `convert` and `merge`: look into checkpoints, convert their layouts, merge adapters."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Inspect, convert and merge checkpoints.", no_args_is_help=True)

Ema = Annotated[bool, typer.Option("--ema", help="Read the EMA weights of a PixArt .pth.")]


@app.command()
def inspect(
    file: Annotated[
        str, typer.Argument(help="A .pth or .safetensors file, a folder, a Hub id (owner/name/FILE), or `demo`.")
    ],
    ema: Ema = False,
) -> None:
    """Show a checkpoint's layout, parameters, dtype and sizes, and which tensors each variant would lack."""
    from stdit_model.weights.hub import local_path
    from stdit_train.assets import named_source, resolve_source

    file = resolve_source(named_source(file))
    local_path(file)

    from stdit_model.convert import describe

    for line in describe(file, ema=ema):
        typer.echo(line)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Weights of any layout: a file, folder, Hub id or `demo`.")
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="DST", help="Pipeline folder to write; or a .pth or .safetensors file, in Open-Sora's layout."
        ),
    ],
    variant: Annotated[
        str | None,
        typer.Option(help="Variant to make of PixArt weights: dit, seq, parallel or latte.", show_default="seq"),
    ] = None,
    num_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads.", show_default="width / 72")] = None,
    ema: Ema = False,
    null_caption: Annotated[
        Path | None, typer.Option(help="Text-encoder states of the empty prompt, [L, Dc], in a .safetensors file.")
    ] = None,
    space_scale: Annotated[
        float | None, typer.Option(min=0.001, help="Scale of spatial positions.", show_default="the file's")
    ] = None,
    time_scale: Annotated[
        float | None, typer.Option(min=0.001, help="Scale of temporal positions.", show_default="the file's")
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="VAE: Hub id to record, or folder to copy.", show_default="the pipeline's own, or sd-vae-ft-ema"
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            help="T5 encoder: Hub id to record, or folder to copy.", show_default="the pipeline's own, or t5-v1_1-xxl"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer: Hub id to record, or folder to copy.", show_default="that of --text-encoder"),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="iddpm, flow, a Hub id or a folder.",
            show_default="the pipeline's own, or by whether the model predicts variance",
        ),
    ] = None,
) -> None:
    """Convert weights of any layout to a pipeline folder, or to a file in the Open-Sora v1.0 layout."""
    from stdit_model.weights.hub import local_path
    from stdit_train.assets import named_source, resolve_source

    source = resolve_source(named_source(source))
    local_path(source)

    from stdit_model.convert import read_null_caption, write_open_sora
    from stdit_model.sampling.folder import write_pipeline

    options: dict[str, Any] = {
        "variant": variant,
        "num_heads": num_heads,
        "ema": ema or None,
        "null_caption": null_caption and read_null_caption(null_caption),
        "space_scale": space_scale,
        "time_scale": time_scale,
    }
    parts: dict[str, Any] = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}
    options = {name: value for name, value in options.items() if value is not None}
    parts = {name: value for name, value in parts.items() if value is not None}
    if destination.suffix in (".pth", ".safetensors"):
        if parts:
            raise typer.BadParameter(f"--{' --'.join(parts).replace('_', '-')} belong to a pipeline folder, not a file")
        model = write_open_sora(source, destination, **options)
    else:
        model = write_pipeline(source, destination, **parts, **options)
    typer.echo(f"{destination}: STDiT {model.config.variant}, {model.num_parameters():,} parameters")


@app.command()
def merge(
    checkpoint: Annotated[
        str, typer.Argument(metavar="PIPELINE", help="Pipeline or run folder, released file, Hub id or `demo`.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="Pipeline folder to write.")],
    lora: Annotated[
        list[str],
        typer.Option(
            "--lora",
            metavar="FILE[:SCALE]",
            help="LoRA adapter: a file, a run folder or a Hub id, and the factor of its update (1). May be repeated.",
        ),
    ],
) -> None:
    """Merge LoRA adapters into the weights of a pipeline."""
    from stdit_cli.commands.sample.request import parse_adapter
    from stdit_model.weights.find_lora import find_lora
    from stdit_train.assets import named_source, resolve_source
    from stdit_train.pipeline.find import find_checkpoint

    source = find_checkpoint(resolve_source(named_source(checkpoint))).source
    loras = [parse_adapter(text) for text in lora]
    for name, _ in loras:
        find_lora(name)

    from stdit_model.sampling.folder import write_pipeline

    model = write_pipeline(source, destination, loras=loras)
    adapters = f"{len(lora)} adapter{'s' * (len(lora) > 1)} merged"
    typer.echo(f"{destination}: STDiT {model.config.variant}, {model.num_parameters():,} parameters, {adapters}")
