"""`stdit eval`: parse, call, show."""

from pathlib import Path
from typing import Annotated, Any

import typer

SPLITS = {"seen": "train", "held-out": "heldout"}


def evaluate(
    checkpoint: Annotated[
        str, typer.Argument(help="Pipeline folder, run folder or hub id; `demo` is bundled.")
    ] = "demo",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each split, or clips of --data.")] = 200,
    split: Annotated[str, typer.Option(help="seen, held-out or both.")] = "both",
    data: Annotated[
        str | None, typer.Option(help="Videos (folder or manifest): their captions as prompts, and compared with.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP model, as in openai/clip-vit-base-patch32: similarity to the prompt.")
    ] = None,
    fvd: Annotated[
        str | None, typer.Option(help="I3D as TorchScript, or a video model of transformers: Fréchet video distance.")
    ] = None,
    vae_clips: Annotated[int, typer.Option(min=0, help="Clips that the VAE encodes and decodes; 0 for none.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Which prompts.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write scores, prompts, seeds and readings here as JSON.")] = None,
) -> None:
    """Score a checkpoint: prompt-following on `shapes`, smoothness, the VAE; CLIP similarity and FVD by option."""
    if split not in ("both", *SPLITS):
        raise ValueError(f"--split {split}: choose {', '.join(SPLITS)} or both")
    if out is not None and out.exists():
        raise FileExistsError(f"{out} exists: take another name")
    if out is not None and not out.resolve().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    from stdit_cli.evaluating import Request, run_evaluation

    splits = list(SPLITS) if split == "both" else [split]
    run_evaluation(Request(checkpoint, prompts, splits, data, clip, fvd, vae_clips, seed, steps, guidance, out))


def score_splits(
    console: Any,
    pipeline: Any,
    splits: list[str],
    count: int,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    measures: Any = None,
) -> dict[str, Any]:
    """Evaluate with a progress bar; scores by the split's name. `measures` makes those of a split."""
    from stdit_cli.evaluating import progress
    from stdit_train.evaluation.evaluate import evaluate_pipeline

    scores = {}
    with progress(console) as bar:
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
                measures=measures(name) if measures else (),
                on_progress=advance,
            )
    return scores


def score_table(scores: dict[str, Any]) -> Any:
    """Shares with their 95 % intervals."""
    from rich.table import Table

    table = Table("share right", *(f"{name} (of {len(found.trials)})" for name, found in scores.items()))
    for aspect in next(iter(scores.values())).shares:
        shares = (found.shares[aspect] for found in scores.values())
        cells = (f"{share['share']:.3f} ({share['low']:.3f} to {share['high']:.3f})" for share in shares)
        table.add_row("all right" if aspect == "all" else aspect, *cells)
    return table
