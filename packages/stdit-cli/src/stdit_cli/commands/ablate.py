"""`stdit ablate`: parse, call, show."""

from pathlib import Path
from typing import Annotated

import typer

MINUTES, SEEDS, PROMPTS = 30.0, 3, 24
QUICK_MINUTES, QUICK_SEEDS, QUICK_PROMPTS = 3.0, 1, 6


def ablate(
    variants: Annotated[
        str | None,
        typer.Option(help="Comma-separated: dit, seq, parallel, latte. All, or with --vary the stage's own."),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", help="Compare values of any setting, e.g. objective.name=iddpm,flow."),
    ] = None,
    match: Annotated[str, typer.Option(help="What is equal: steps, parameters, flops or time.")] = "steps",
    seeds: Annotated[int | None, typer.Option(min=1, help=f"Runs of each arm, paired by seed; {SEEDS}.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a run, in place of a time budget.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help=f"For everything together, as timed on this machine; {MINUTES:g}.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK_MINUTES:g} minutes, {QUICK_SEEDS} seed: a look, not a ranking.")
    ] = False,
    prompts: Annotated[
        int | None, typer.Option(min=0, help=f"Of seen and of held-out prompts, to score each run by; {PROMPTS}.")
    ] = None,
    stage: Annotated[str, typer.Option(help="Whose settings.")] = "demo",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs, where an interrupted ablation goes on; runs/ablation.")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting.")] = None,
) -> None:
    """Train arms on the same data, noise and steps from the same start; compare them with paired intervals."""
    if steps is not None and minutes is not None:
        raise ValueError("--steps and --minutes both say how long: give one")
    from stdit_cli.ablating import Request, run_ablation

    request = Request(
        variants=variants,
        varied=vary or [],
        match=match,
        seeds=seeds or (QUICK_SEEDS if quick else SEEDS),
        steps=steps,
        minutes=None if steps else minutes or (QUICK_MINUTES if quick else MINUTES),
        quick=quick,
        prompts=(QUICK_PROMPTS if quick else PROMPTS) if prompts is None else prompts,
        stage=stage,
        out=out or Path("runs/ablation-quick" if quick else "runs/ablation"),
        settings=setting or [],
    )
    run_ablation(request)
