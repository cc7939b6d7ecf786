"""`stdit ablate`: parse, call, show."""

from pathlib import Path
from typing import Annotated

import typer

QUICK_STEPS = 150


def ablate(
    variants: Annotated[
        str, typer.Option(help="Comma-separated: dit, seq, parallel, latte.")
    ] = "dit,seq,parallel,latte",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant; seed i is paired across variants.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each run; the stage's unless given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK_STEPS} steps each: minutes in all.")] = False,
    stage: Annotated[str, typer.Option(help="Whose settings.")] = "demo",
    out: Annotated[Path, typer.Option(help="Folder of the runs; an interrupted ablation goes on there.")] = Path(
        "runs/ablation"
    ),
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting.")] = None,
) -> None:
    """Train variants on the same data, noise and steps from the same start, and compare them."""
    from stdit_cli.ablating import run_ablation

    run_ablation(variants, seeds, steps, quick, stage, out, setting or [])
