"""`stdit build-demo`: the bundled model, from nothing."""

from pathlib import Path
from typing import Annotated

import typer


def build_demo(
    out: Annotated[Path, typer.Argument(help="Folder to build in; what is done there already is kept.")],
    vae_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the VAE, and again of its decoder alone.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the transformer.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time budget of the transformer, in place of steps.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each split that the scores are of.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of all weights and data.")] = 0,
) -> None:
    """Train VAE, text side and transformer of the demo model, score it, and write OUT/demo with a model card.

    Interrupted, the same command goes on: parts that are whole are kept, the transformer from its last checkpoint.
    """
    from stdit_cli.building import run_build

    run_build(out, vae_steps, steps, minutes, prompts, seed)
