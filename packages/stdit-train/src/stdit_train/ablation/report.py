"""Report an ablation: rankings, tables and curves, and one self-contained HTML page with videos side by side."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import mean

from stdit_data.storage.atomic import replace_text
from stdit_train.ablation.arms import Arm
from stdit_train.ablation.notes import QUICK, compare, time_taken
from stdit_train.ablation.results import (
    HELD_OUT,
    LOSS,
    SEEN,
    Ranking,
    Result,
    by_arm,
    separation,
    write_csv,
    write_differences,
)
from stdit_train.ablation.runner import Ablation
from stdit_train.evaluation.confidence import Interval, mean_interval
from stdit_train.report.html import image, page, player_controls, row, table, video
from stdit_train.report.plots import new_figure
from stdit_train.report.run_report import sampled_prompts, sessions_facts, settings_section

METHOD = (
    "Within a seed all runs saw the same clips in the same order with the same noise and timesteps, and started from "
    "the same weights wherever a parameter has the same name and shape."
)
INTERVALS = (
    "Intervals are Student's, 95 %, over seeds; two arms are compared by their paired differences, and are not "
    "separated if that interval contains zero. "
    "The intervals are not corrected for many comparisons: of twenty pairs of equal arms, one is separated by chance."
)


def write_ablation_report(ablation: Ablation, results: Sequence[Result], command: str, quick: bool) -> list[Path]:
    """Write runs.csv, differences.csv, curves.png, report.html and, if there is a ranking, final.png into the folder.

    Args:
        ablation: its arms and folder.
        results: of its finished runs, one or more.
        command: the command line, for the page.
        quick: state on the page that this is not a ranking.

    Returns:
        Paths of the files.
    """
    folder, study = ablation.folder, ablation.study
    runs, pairs, curves, final, html = (
        folder / name for name in ("runs.csv", "differences.csv", "curves.png", "final.png", "report.html")
    )
    compared = compare(ablation, results)
    rankings = compared.rankings
    write_csv(results, runs)
    write_differences(rankings, pairs)
    plot_curves(results, curves, study.match)
    if rankings:
        plot_final(results, rankings, final)
    else:
        final.unlink(missing_ok=True)  # of an earlier report, with other arms
    parts = [f"<h1>{escape(', '.join(arm.name for arm in ablation.arms))}</h1>"]
    parts += [f"<p><strong>{QUICK}</strong></p>" if quick else ""]
    parts += [_facts(ablation, results, command), f"<h2>{'Ranking' if rankings else 'No ranking'}</h2>"]
    parts += [_ranking(ranking, quick) for ranking in rankings]
    notes = compared.notes or ([] if rankings else ["No seed that all arms have finished yet."])
    parts += [f"<p>{escape(line)}</p>" for line in notes]
    parts += [
        f"<p>{METHOD}</p>",
        image(final, "final measures") if rankings else "",
        image(curves, "validation losses"),
    ]
    parts += ["<h2>Arms</h2>", _arms(ablation, results)]
    parts += ["<h2>Paired differences</h2>", *map(_differences, rankings)] if rankings else []
    parts += ["<h2>Videos</h2>", _videos(ablation, results)]
    settings = {arm.name: ablation.run_folder(arm, 0).read_config() for arm in _begun(ablation)}
    parts += ["<h2>Settings</h2>", settings_section(settings)]
    replace_text(html, page("stdit ablation", parts))
    return [file for file in (html, curves, final, runs, pairs) if file.exists()]


def plot_curves(results: Sequence[Result], output: Path, match: str) -> None:
    """Plot validation loss over steps, or over FLOPs or minutes where these are matched; mean and range over seeds.

    Args:
        results: of all finished runs.
        output: PNG file to write.
        match: what is equal across arms.
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
    axes.set(xlabel=label, ylabel="validation loss (EMA)", title="mean and range over seeds")
    axes.ticklabel_format(axis="y", useOffset=False)
    if label == "step":
        axes.locator_params(axis="x", integer=True)
    if names:
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def plot_final(results: Sequence[Result], rankings: Sequence[Ranking], output: Path) -> None:
    """Plot a panel per measure: seeds as dots beside mean and 95 % interval, best arm at the top.

    Args:
        results: of all finished runs.
        rankings: the measures to show, one or more.
        output: PNG file to write.
    """
    count = len(rankings)
    figure, axes = new_figure(4.6 * count, 1.4 + 0.5 * max(len(ranking.means) for ranking in rankings), count)
    for panel, ranking in zip(list(axes) if count > 1 else [axes], rankings, strict=True):
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


def _facts(ablation: Ablation, results: Sequence[Result], command: str) -> str:
    facts = {"command": command, "matched": ablation.study.match, "seeds": f"{len({r.seed for r in results})}"}
    trained = sessions_facts(ablation.run_folder(arm, 0) for arm in _begun(ablation))
    facts |= {key: trained[key] for key in ("date", "machine", "versions") if key in trained}
    if took := time_taken(ablation):
        facts["duration"] = took
    return table(["ablation", ablation.folder.name], "".join(row([title, text]) for title, text in facts.items()))


def _ranking(ranking: Ranking, quick: bool) -> str:
    direction = "lower is better" if ranking.measure == LOSS else "share of prompts right, higher is better"
    name = ranking.measure if ranking.measure == LOSS else f"{ranking.measure} prompts"
    lines = f"<p>By {name} ({direction}): <strong>{escape(ranking.line)}</strong>"
    lines += f"<br>{escape(separation(ranking))}."
    return lines + (f" {QUICK.capitalize()}." if quick else "") + "</p>"


def _arms(ablation: Ablation, results: Sequence[Result]) -> str:
    """Return two tables: what each arm costs, and its results."""
    costs, outcomes = "", []
    for arm in ablation.arms:
        runs = [result for result in results if result.arm == arm.name]
        if not runs:
            continue
        first, steps = runs[0], mean(r.steps for r in runs)
        cells = [arm.name, str(len(runs)), f"{steps:,.0f}", f"{first.parameters:,}", f"{first.same_start:.0%}"]
        cells += [f"{first.step_flops / 1e9:.3g}", f"{steps * first.step_flops / 1e12:.3g}"]
        cells += [f"{mean(r.seconds_per_step for r in runs):.3f}", f"{first.step_memory / 2**20:,.0f}"]
        costs += row([*cells, f"{max(r.process_memory for r in runs):.2f}"])
        cells = [arm.name]
        for measure in (LOSS, SEEN, HELD_OUT):
            values = [value for r in runs if (value := r.measure(measure)) is not None]
            cells.append(mean_interval(values).text(4 if measure == LOSS else 3) if values else "")
        for aspect in ("colour", "shape", "motion"):
            values = [r.shares[SEEN][aspect] for r in runs if aspect in r.shares.get(SEEN, {})]
            cells.append(f"{mean(values):.3f}" if values else "")
        outcomes.append(cells)
    head = [
        "arm",
        "runs",
        "steps",
        "parameters",
        "same start",
        "GFLOPs per step",
        "TFLOPs in total",
        "seconds per step",
    ]
    head += ["step memory, MiB", "process memory, GiB"]
    names = ["arm", LOSS, f"{SEEN}: all correct", f"{HELD_OUT}: all correct"]
    names += [f"{SEEN}: {aspect}" for aspect in ("colour", "shape", "motion")]
    shown = [i for i, name in enumerate(names) if name == "arm" or any(cells[i] for cells in outcomes)]
    rows = "".join(row([cells[i] for i in shown]) for cells in outcomes)
    note = "FLOPs and step memory are estimated; process memory is the measured peak. Seconds per step were measured "
    note += "before training, the arms in turns." if ablation.costs else "during training."
    return f"{table(head, costs)}<p>{note}</p>{table([names[i] for i in shown], rows)}"


def _differences(ranking: Ranking) -> str:
    body = ""
    for (better, worse), found in ranking.differences.items():
        verdict = "separated" if found.separated else "not separated"
        cells = [f"{better} - {worse}", _difference(found), str(found.count), verdict]
        body += row(cells, "differs" if found.separated else "")
    return f"<h3>{escape(ranking.measure)}</h3>" + table(["pair", "difference", "seeds", ""], body)


def _difference(found: Interval) -> str:
    return f"{found.mean:.3g}" + ("" if found.half is None else f" ± {found.half:.2g}")


def _begun(ablation: Ablation) -> list[Arm]:
    return [arm for arm in ablation.arms if ablation.run_folder(arm, 0).config_file.exists()]


def _videos(ablation: Ablation, results: Sequence[Result]) -> str:
    """Return the last samples of seed 0: a row per prompt, a column per arm."""
    done = {result.arm: result.steps for result in results if result.seed == 0}
    arms = [arm for arm in ablation.arms if arm.name in done]
    html = player_controls()
    prompts = sampled_prompts(ablation.run_folder(arms[0], 0)) if arms else []
    for i, prompt in enumerate(prompts):
        shown = ""
        for arm in arms:
            file = ablation.run_folder(arm, 0).samples / f"step-{done[arm.name]:06d}-{i}.mp4"
            shown += video(file, arm.name) if file.is_file() else ""
        html += f"<p>{escape(prompt)}</p>{shown}"
    return html
