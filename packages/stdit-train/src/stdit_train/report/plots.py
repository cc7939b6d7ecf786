"""Plot loss curves as PNG."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stdit_train.tracking.metrics import read_metrics


def plot_losses(metrics_file: Path, output: Path, title: str) -> None:
    """Plot training loss, raw and smoothed, and validation loss over the steps of a run.

    Args:
        metrics_file: the run's metrics.jsonl.
        output: PNG file to write.
        title: title of the plot.
    """
    figure, axes = new_figure(7, 4)
    rows = read_metrics(metrics_file)
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training")
        axes.plot(steps, smooth(list(losses)), color="#08519c", linewidth=1.6, label="training, smoothed")
        limit(axes, losses)
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#d94801", marker="o", markersize=3, label="validation (EMA)")
    axes.set(xlabel="step", ylabel="loss", title=title)
    if training or validation:
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def plot_runs(
    metrics: dict[str, list[dict[str, float]]], output: Path, starts: Mapping[str, int] | None = None
) -> None:
    """Plot several runs in one figure: training loss, raw and smoothed, and validation loss where there is one.

    Args:
        metrics: the rows of each run's metrics.jsonl, by its name.
        output: PNG file to write.
        starts: steps before a run's first, by its name; the stages of a schedule follow one another.
    """
    starts = starts or {}
    validated = any("validation_loss" in row for rows in metrics.values() for row in rows)
    figure, axes = new_figure(12 if validated else 7, 4.2, 2 if validated else 1)
    panels = list(axes) if validated else [axes]
    losses_of_all: list[Sequence[float]] = []
    for i, (name, rows) in enumerate(metrics.items()):
        start = starts.get(name, 0)
        points = [(start + row["step"], row["loss"]) for row in rows if "loss" in row]
        if points:
            steps, losses = zip(*points, strict=True)
            panels[0].plot(steps, losses, color=f"C{i % 10}", linewidth=0.6, alpha=0.3)
            panels[0].plot(steps, smooth(list(losses)), color=f"C{i % 10}", linewidth=1.6, label=name)
            losses_of_all.append(losses)
        held = [(start + row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
        if held:
            panels[1].plot(*zip(*held, strict=True), color=f"C{i % 10}", marker="o", markersize=3, label=name)
    limit(panels[0], *losses_of_all)
    label = "step (all stages)" if any(starts.values()) else "step"
    panels[0].set(xlabel=label, ylabel="training loss, raw and smoothed")
    if validated:
        panels[1].set(xlabel=label, ylabel="validation loss (EMA)")
    for panel in panels:
        panel.grid(alpha=0.25)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def limit(axes: Any, *curves: Sequence[float]) -> None:
    """Limit the y axis to 0 .. 1.1 times the largest 98th percentile of the curves; values not finite are ignored."""
    finite = [sorted(filter(math.isfinite, curve)) for curve in curves]
    tops = [values[int(len(values) * 0.98)] for values in finite if values]
    if tops and max(tops) > 0:
        axes.set_ylim(0, 1.1 * max(tops))


def smooth(values: list[float], share: float = 0.95) -> list[float]:
    """Return the bias-corrected exponential moving average (Kingma & Ba 2015, section 3).

    Values that are not finite become gaps.
    """
    smoothed, average, count = [], 0.0, 0
    for value in values:
        if not math.isfinite(value):
            smoothed.append(math.nan)
            continue
        count += 1
        average = share * average + (1 - share) * value
        smoothed.append(average / (1 - share**count))
    return smoothed


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure without window or global state, and its axes (an array for several columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)
