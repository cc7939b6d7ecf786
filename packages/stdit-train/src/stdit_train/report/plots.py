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
        marker = _marker(steps)
        axes.plot(steps, losses, marker=marker, color="#9ecae1", linewidth=0.8, label="training")
        axes.plot(
            steps, smooth(list(losses)), marker=marker, color="#08519c", linewidth=1.6, label="training, smoothed"
        )
        limit(axes, losses, [loss for _, loss in validation])
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#d94801", marker="o", markersize=3, label="validation (EMA)")
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="step", ylabel="loss", title=title)
    if training or validation:
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def plot_runs(
    metrics: dict[str, list[dict[str, float]]],
    output: Path,
    starts: Mapping[str, int] | None = None,
    rates: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Plot several runs in one figure: training loss, raw and smoothed, validation loss and learning rate.

    The panels are below one another over the same steps; those without a value are left out.

    Args:
        metrics: the rows of each run's metrics.jsonl, by its name.
        output: PNG file to write.
        starts: steps before a run's first, by its name; the stages of a schedule follow one another.
        rates: learning rates of each run, by its name, which its schedule scales; of several the first is drawn solid.
    """
    starts, rates = starts or {}, rates or {}
    rows_of_all = [row for rows in metrics.values() for row in rows]
    validated = any("validation_loss" in row for row in rows_of_all)
    scheduled = bool(rates) and any("lr_factor" in row for row in rows_of_all)
    heights = [3.6, *([2.6] if validated else []), *([1.8] if scheduled else [])]
    figure, axes = new_figure(7.5, sum(heights) + 0.6, 1, heights)
    panels = list(axes) if len(heights) > 1 else [axes]
    losses_of_all: list[Sequence[float]] = []
    for i, (name, rows) in enumerate(metrics.items()):
        start, color = starts.get(name, 0), f"C{i % 10}"
        points = [(start + row["step"], row["loss"]) for row in rows if "loss" in row]
        if points:
            steps, losses = zip(*points, strict=True)
            marker = _marker(steps)
            panels[0].plot(steps, losses, marker=marker, color=color, linewidth=0.6, alpha=0.3)
            panels[0].plot(steps, smooth(list(losses)), marker=marker, color=color, linewidth=1.6, label=name)
            losses_of_all.append(losses)
        held = [(start + row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
        if held:
            panels[1].plot(*zip(*held, strict=True), color=color, marker="o", markersize=3, label=name)
        factors = [(start + row["step"], row["lr_factor"]) for row in rows if "lr_factor" in row]
        for rate, style in zip(rates.get(name, ()), ("-", "--"), strict=False):
            if factors:
                panels[-1].plot([step for step, _ in factors], [rate * f for _, f in factors], style, color=color)
    limit(panels[0], *losses_of_all)
    panels[0].set(ylabel="training loss, raw and smoothed")
    if validated:
        panels[1].set(ylabel="validation loss (EMA)")
    if scheduled:
        dashed = ",\ndashed: Muon" if any(len(each) > 1 for each in rates.values()) else ""
        panels[-1].set(ylabel=f"learning rate{dashed}")
        panels[-1].set_ylim(bottom=0)
    panels[-1].locator_params(axis="x", integer=True)
    panels[-1].set(xlabel="step (all stages)" if any(starts.values()) else "step")
    for panel in panels:
        panel.grid(alpha=0.25)
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False)
    figure.align_ylabels()
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def _marker(steps: Sequence[float]) -> str:
    """Return the marker of a curve: a line through a single point, of a short run, would be invisible."""
    return "o" if len(steps) == 1 else ""


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


def new_figure(width: float, height: float, columns: int = 1, heights: Sequence[float] = (1.0,)) -> tuple[Any, Any]:
    """Return a figure without window or global state, and its axes (an array for several).

    Args:
        width: of the figure, in inches.
        height: of the figure, in inches.
        columns: panels side by side.
        heights: relative, of panels above one another, which share the x axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    rows = len(heights)
    return figure, figure.subplots(rows, columns, sharex=rows > 1, gridspec_kw={"height_ratios": list(heights)})
