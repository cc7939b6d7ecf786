"""The pictures of an ablation: validation losses with a band over seeds, and final measures with their intervals."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from stdit_train.ablation.results import LOSS, Ranking, Result, by_arm
from stdit_train.report.plots import new_figure


def plot_curves(results: Sequence[Result], output: Path, match: str) -> None:
    """Validation loss over steps (over FLOPs or minutes where these are matched): mean, and band from least to most.

    Args:
        results: of all runs.
        output: PNG file.
        match: what the arms have in common.
    """
    scale: Callable[[Result], float] = {
        "flops": lambda result: result.step_flops / 1e12,
        "time": lambda result: result.seconds_per_step / 60,
    }.get(match, lambda result: 1.0)
    figure, axes = new_figure(7, 4.2)
    names = list(dict.fromkeys(result.arm for result in results))
    for i, name in enumerate(names):
        runs = [result for result in results if result.arm == name and result.curve]
        points = min((len(run.curve) for run in runs), default=0)
        if not points:
            continue
        x = [mean(run.curve[k][0] * scale(run) for run in runs) for k in range(points)]
        losses = [[run.curve[k][1] for run in runs] for k in range(points)]
        axes.plot(x, [mean(values) for values in losses], color=f"C{i % 10}", marker="o", markersize=3, label=name)
        axes.fill_between(x, [min(v) for v in losses], [max(v) for v in losses], color=f"C{i % 10}", alpha=0.18, lw=0)
    label = {"flops": "TFLOPs of training", "time": "minutes of training"}.get(match, "step")
    axes.set(xlabel=label, ylabel="validation loss (EMA)", title="mean over seeds; the band is from least to most")
    axes.ticklabel_format(axis="y", useOffset=False)
    if label == "step":
        axes.locator_params(axis="x", integer=True)
    if names:
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def plot_final(results: Sequence[Result], rankings: Sequence[Ranking], output: Path) -> None:
    """A panel a measure: the seeds as dots, mean and 95 % interval beside them, best arm at the top.

    Args:
        results: of all runs.
        rankings: the measures to show.
        output: PNG file.
    """
    count = max(len(rankings), 1)
    figure, axes = new_figure(4.6 * count, 1.4 + 0.5 * max((len(r.means) for r in rankings), default=1), count)
    panels = list(axes) if count > 1 else [axes]
    for panel, ranking in zip(panels, rankings, strict=False):
        values = by_arm(results, ranking.measure)
        for y, (name, interval) in enumerate(ranking.means.items()):
            dots = list(values[name].values())
            panel.plot(dots, [y + 0.18] * len(dots), "o", color="#9ecae1", markersize=4)
            panel.errorbar(interval.mean, y, xerr=interval.half or None, fmt="o", color="#08519c", capsize=3)
        panel.set_yticks(range(len(ranking.means)), list(ranking.means))
        panel.set_ylim(len(ranking.means) - 0.5, -0.5)  # downwards
        title = ranking.measure if ranking.measure == LOSS else f"share right, {ranking.measure} prompts"
        panel.set(title=title)
        panel.ticklabel_format(axis="x", useOffset=False)
        panel.locator_params(axis="x", nbins=3)
        panel.grid(alpha=0.25, axis="x")
    figure.tight_layout()
    figure.savefig(output, dpi=120)
