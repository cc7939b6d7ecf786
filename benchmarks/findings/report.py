"""Write README.md from finished runs: tables, paired differences, and the conclusion that each interval supports."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from questions import DEMO_STEPS, MINUTES, PROMPTS, QUESTIONS, SEEDS, STEPS, Contrast, Question

from stdit_data.storage.atomic import replace_text
from stdit_train.evaluation.confidence import Interval, paired_difference

LOSS, ASPECTS, ALL = "validation loss", "aspects correct, seen", "all correct, seen"
WIDTH = 118  # characters per line of text
MEASURES = (LOSS, ASPECTS, ALL)
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # of arm and seed, as run.py wrote them

INTRODUCTION = """# Testing the report's findings

Tests of findings from Open-Sora 1.0's report, on the embedded data set `shapes`, with models that train in minutes.
The results describe these models on this data. A finding that is not confirmed here may still hold at the report's
scale, and one that is confirmed is no proof for that scale. Temporal compression has a page of its own:
[temporal_vae.md](temporal_vae.md).

{commands}
    uv run python benchmarks/findings/run.py report {folder}

Each run is one of `stdit train`, on a cache of latents that all seeds share. Unless stated otherwise: 8 frames of
48x48 pixels, seq, width 64, 4 blocks, patch (1,2,2), rectified flow, Muon, batch 8, caption dropout 0.1, fp32. Larger
or longer clips would still be noise after so few steps. FLOPs are those of the transformer's matrix products, by
formula. The seed determines initial weights, order, noise and timesteps; within a seed, all arms share the clips, and
arms of the same architecture share the initial weights.

The validation loss is measured on 64 held-out clips, with fixed noise, evenly spaced timesteps and EMA weights.
Prompts are the same for every run, and the videos are read by image analysis: "all" is the share of videos with
colour, shape and motion correct, "aspects" the mean of the three separate shares. Tables show the mean, with minimum
and maximum over the seeds in brackets. Differences are the first arm minus the second, paired by seed, with Student's
95 % interval. If the interval excludes zero, the first arm is called better or worse; otherwise the two are not
distinguishable, which does not prove that they are equal. Three seeds give wide intervals (t = 4.3), and about one in
twenty comparisons of equal arms would appear different by chance.
"""


def write_report(folder: Path, out: Path) -> Path:
    """Write the page from folder/results to `out`, and return `out`."""
    results = read_results(folder)
    replace_text(out, page(results, str(folder)))
    return out


def read_results(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Read every finished run of a folder, by arm and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted((folder / "results").glob("*-seed*.json")):
        result = json.loads(file.read_text())
        found.setdefault(result["arm"], {})[result["seed"]] = result
    return found


def page(results: Results, folder: str) -> str:
    """Return the whole page."""
    runs = [run for seeds in results.values() for run in seeds.values()]
    parts = [INTRODUCTION.format(folder=folder, commands="\n".join(commands(results, folder)))]
    if runs:
        machines = ", ".join(sorted({run["machine"] for run in runs}))
        minutes = sum(run["seconds"] for run in runs) / 60
        dates = sorted({run["written"] for run in runs})
        span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        told = (
            f"{len(runs)} runs on {machines}; {minutes:.0f} minutes of training steps, {span}. Runs may have shared "
            "the machine with each other and with other work, so times are not compared."
        )
        parts += [textwrap.fill(told, WIDTH), ""]
    parts += [section(question, results) for question in QUESTIONS]
    return "\n".join(parts)


def commands(results: Results, folder: str) -> list[str]:
    """Return the commands of the runs: one for the usual questions, and one for each that must be named."""
    asked = [("", [question for question in QUESTIONS if not question.extra])]
    asked += [(f" --only {question.name}", [question]) for question in QUESTIONS if question.extra]
    lines = []
    for only, questions in asked:
        names = {arm for question in questions for arm in question.arms}
        runs = [run for arm in names for run in results.get(arm, {}).values()]
        if runs or not only:
            lines.append(f"    uv run python benchmarks/findings/run.py {folder}{only}{_options(runs)}")
    return lines


def _options(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the options of run.py that these runs were made with, other than the defaults."""
    given = ""
    scale = {"base": STEPS, "demo-flow": DEMO_STEPS, "demo-iddpm": DEMO_STEPS}
    for minutes in {MINUTES * run["steps"][0] / scale[run["arm"]] for run in runs if run["arm"] in scale} - {MINUTES}:
        given += f" --minutes {minutes:g}"
    seeds = max((run["seed"] for run in runs), default=SEEDS - 1) + 1
    given += f" --seeds {seeds}" if seeds != SEEDS else ""
    for prompts in {run["prompts"] for run in runs} - {PROMPTS}:
        given += f" --prompts {prompts}"
    return given


def section(question: Question, results: Results) -> str:
    """Return the section of a question: its arms, their differences, the conclusions."""
    lines = [f"## {question.title}", "", *textwrap.wrap(question.about, WIDTH), ""]
    there = [arm for arm in _with_images(question, results) if arm in results]
    if not there:
        command = f"--only {question.name}"
        return "\n".join([*lines, f"Not run yet (`{command}`).", ""])
    lines += arms_table(there, results)
    rows, conclusions = [], []
    for contrast in question.contrasts:
        found = differences(contrast, question, results)
        rows += [
            f"| {contrast.arm} - {contrast.against} | {measure} | {_signed(difference)} | {difference.count} | "
            f"{verdict(difference, measure)} |"
            for measure, difference in found.items()
        ]
        said = conclusion(contrast, question, results)
        conclusions += textwrap.wrap(said, WIDTH, initial_indent="- ", subsequent_indent="  ")
    if rows:
        lines += ["", "| difference | of | mean | seeds | the first is |", "|---|---|---:|---:|---|", *rows]
    return "\n".join([*lines, "", *conclusions, ""])


def _with_images(question: Question, results: Results) -> list[str]:
    """Return the question's arms, after the image models that they started with."""
    return (["image"] if any(arm.endswith("-image") for arm in question.arms) else []) + question.arms


def arms_table(names: Sequence[str], results: Results) -> list[str]:
    """Return a table with a line per arm."""
    head = "| arm | what | seeds | steps | TFLOPs | Mtokens | loss | all | colour | shape | motion | held-out |"
    lines = [head, "|---|---|---" + "|---:" * 9 + "|"]
    for name in names:
        runs = list(results[name].values())
        first = runs[0]
        about, ended = first["about"], [run for run in runs if run["ended"]]
        if any(run["skipped"] for run in runs):
            about += f"; {sum(run['skipped'] for run in runs)} steps skipped"
        if ended:
            about += f"; {len(ended)} of {len(runs)} ended early: not finite"
        cells = [name, about, str(len(runs)), " + ".join(map(str, first["steps"]))]
        cells += [f"{first['flops'] / 1e12:.2f}", f"{first['tokens'] / 1e6:.2f}"]
        cells.append(_spread([run["validation_loss"] for run in runs], 4))
        for split, aspect in (*(("seen", a) for a in ("all", "colour", "shape", "motion")), ("held-out", "all")):
            cells.append(_spread([run["shares"].get(split, {}).get(aspect) for run in runs], 2))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _spread(values: Sequence[float | None], digits: int) -> str:
    """Format the mean (minimum to maximum) of the values; empty without a finite value."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found:
        return ""
    text = f"{mean(found):.{digits}f}"
    return text if len(found) < 2 else f"{text} ({min(found):.{digits}f} to {max(found):.{digits}f})"


def value(run: Mapping[str, Any], measure: str) -> float | None:
    """Return a measure of a finished run; None where it was not measured."""
    if measure == LOSS:
        return run["validation_loss"]
    seen = run["shares"].get("seen")
    if seen is None:
        return None
    return seen["all"] if measure == ALL else mean(seen[aspect] for aspect in ("colour", "shape", "motion"))


def differences(contrast: Contrast, question: Question, results: Results) -> dict[str, Interval]:
    """Return the first arm minus the second by measure, over the seeds that both have."""
    found = {}
    for measure in MEASURES if question.by_loss else MEASURES[1:]:
        first, second = (
            {seed: number for seed, run in results.get(arm, {}).items() if (number := value(run, measure)) is not None}
            for arm in (contrast.arm, contrast.against)
        )
        if first.keys() & second.keys():
            found[measure] = paired_difference(first, second)
    return found


def verdict(difference: Interval, measure: str) -> str:
    """Return "better", "worse" or "not distinguishable"; one seed has no interval."""
    if difference.half is None:
        return "one seed, no interval"
    if not difference.separated:
        return "not distinguishable"
    return "better" if (difference.mean < 0) == (measure == LOSS) else "worse"


def conclusion(contrast: Contrast, question: Question, results: Results) -> str:
    """Return a sentence that follows from the intervals, by loss where that is comparable, and by prompts."""
    ended = {
        arm: sum(1 for run in results.get(arm, {}).values() if run["ended"]) for arm in (contrast.arm, contrast.against)
    }
    broken = [
        f"{count} of {len(results[arm])} runs of {arm} ended early, not finite" for arm, count in ended.items() if count
    ]
    found = differences(contrast, question, results)
    if not found:
        return f"{contrast.says}: {'; '.join(broken) or 'not run yet'}."
    if all(difference.half is None for difference in found.values()):
        return f"{contrast.says}: {'; '.join([*broken, 'one seed, so no conclusion'])}."
    verdicts = {measure: verdict(difference, measure) for measure, difference in found.items()}
    told = {word for word in verdicts.values() if word in ("better", "worse")}
    if not told:
        summary = "not distinguishable here"
    elif len(told) == 2:
        summary = "the measures disagree"
    else:
        (word,) = told
        summary = f"{word}, {'as expected' if word == contrast.expected else 'against the expectation'}"
    details = ", ".join(f"{verdicts[measure]} by {measure} ({_signed(found[measure])})" for measure in found)
    return f"{contrast.says}: **{summary}** ({'; '.join([*broken, details])})."


def _signed(difference: Interval) -> str:
    return f"{difference.mean:+.4f}" + ("" if difference.half is None else f" ± {difference.half:.4f}")
