"""`stdit eval`: parse, call, show."""

from pathlib import Path
from typing import Annotated, Any

import typer

SPLITS = {"seen": "train", "held-out": "heldout"}


def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="Pipeline folder, run folder or hub id; `demo` is bundled.")
    ] = "demo",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each split.")] = 200,
    split: Annotated[str, typer.Option(help="seen, held-out or both.")] = "both",
    seed: Annotated[int, typer.Option(min=0, help="Which prompts.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write scores, prompts, seeds and readings here as JSON.")] = None,
) -> None:
    """Prompt-following on `shapes`: share of videos that show the colour, shape and motion of their prompt."""
    if split not in ("both", *SPLITS):
        raise ValueError(f"--split {split}: choose {', '.join(SPLITS)} or both")
    if out is not None and out.exists():
        raise FileExistsError(f"{out} exists: take another name")
    from rich.console import Console

    from stdit_cli.assets import resolve
    from stdit_train.loading import load_pipeline

    console = Console(highlight=False)
    pipeline = load_pipeline(resolve(checkpoint))
    splits = list(SPLITS) if split == "both" else [split]
    scores = score_splits(console, pipeline, splits, prompts, seed, steps, guidance)
    console.print(score_table(scores))
    if out is not None:
        from stdit_train.evaluate import write_scores

        settings = {"checkpoint": checkpoint, "prompts": prompts, "seed": seed, "steps": steps, "guidance": guidance}
        write_scores(scores, settings, out)
        console.print(f"{out}")


def score_splits(
    console: Any,
    pipeline: Any,
    splits: list[str],
    count: int,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
) -> dict[str, Any]:
    """Evaluate with a progress bar; scores by the split's name."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from stdit_train.evaluate import evaluate_pipeline

    scores = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        for name in splits:
            task = bar.add_task(f"{name} prompts", total=count)

            def advance(done: int, task: Any = task) -> None:
                bar.update(task, completed=done)

            scores[name] = evaluate_pipeline(
                pipeline,
                SPLITS[name],  # type: ignore[arg-type]
                count,
                seed=seed,
                steps=steps,
                guidance=guidance,
                on_progress=advance,
            )
    return scores


def score_table(scores: dict[str, Any]) -> Any:
    """Shares with their 95 % intervals."""
    from rich.table import Table

    table = Table("prompts", "number", "all right", "colour", "shape", "motion")
    for name, found in scores.items():
        cells = [f"{s['share']:.3f} ({s['low']:.3f} to {s['high']:.3f})" for s in found.shares.values()]
        table.add_row(name, str(len(found.trials)), *cells)
    return table
