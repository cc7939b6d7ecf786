"""What `stdit ablate` shows: a bar for each run, a table, a plot."""

from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from typer import Exit

from stdit_cli.ablate import QUICK_STEPS
from stdit_cli.training import INTERRUPTED, TrainingBar, with_demo_parts
from stdit_train.config import load_stage, parse_overrides


def run_ablation(
    variants: str, seeds: int, steps: int | None, quick: bool, stage: str, out: Path, settings: list[str]
) -> None:
    """Train what is not trained yet, then report."""
    from stdit_train.ablation import Result, ablate, parse_variants, write_csv
    from stdit_train.report import plot_variants

    console = Console(highlight=False)
    chosen = parse_variants(variants)
    overrides: dict[str, Any] = {}
    if steps is not None or quick:
        count = steps or QUICK_STEPS
        overrides = {
            "steps": count,
            "validate_every": max(count // 10, 1),
            "sample_every": count,
            "checkpoint_every": max(count // 5, 1),
            "log_every": 5,
        }
        if quick:
            overrides |= {"data.clips": 8 * count, "optimizer.ema": 0.9}
    overrides |= parse_overrides(settings)
    config = with_demo_parts(load_stage(stage, overrides), overrides)

    bars: list[TrainingBar] = []

    def watch(variant: str, seed: int) -> TrainingBar:
        for bar in bars:
            bar.bar.stop()
        console.print(f"{variant}, seed {seed}")
        bars.append(TrainingBar(console, quiet=True))
        bars[-1].bar.start()
        return bars[-1]

    try:
        results, finished = ablate(config, chosen, range(seeds), out, watch)
    finally:
        for bar in bars:
            bar.bar.stop()
    if not finished:
        console.print("stopped, saved; the same command goes on from here")
        raise Exit(INTERRUPTED)

    by_variant: dict[str, list[Result]] = {variant: [r for r in results if r.variant == variant] for variant in chosen}
    table = Table("variant", "parameters", "GFLOPs a step", "seconds a step", "validation loss", "runs")
    for variant, runs in sorted(by_variant.items(), key=lambda item: mean(r.validation_loss for r in item[1])):
        losses = [r.validation_loss for r in runs]
        spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
        table.add_row(
            variant,
            f"{runs[0].parameters:,}",
            f"{runs[0].step_flops / 1e9:.1f}",
            f"{mean(r.seconds_per_step for r in runs):.3f}",
            f"{mean(losses):.4f}{spread}",
            str(len(runs)),
        )
    console.print(table)
    plot, rows = out / "ablation.png", out / "ablation.csv"
    plot_variants(
        {v: [r.curve for r in runs] for v, runs in by_variant.items()}, plot, f"{stage}: {config.steps} steps"
    )
    write_csv(results, rows)
    console.print(f"{plot}\n{rows}")
    if quick:
        console.print("a quick look, not a ranking")
