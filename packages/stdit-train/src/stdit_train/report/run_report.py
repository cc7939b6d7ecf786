"""A report on runs: curves as PNG, and one self-contained HTML page with curves, sampled videos and settings."""

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from stdit_train.checkpoint.run_folder import RunFolder, stage_folders
from stdit_train.config.load import SCHEDULE_FILE, ConfigError, flat
from stdit_train.report.html import image, page, row, table, video
from stdit_train.report.plots import plot_runs
from stdit_train.tracking.metrics import read_metrics

SHOWN_STEPS = 5  # of each run's samples: the first, the last, and evenly between


def write_report(runs: list[Path], out: Path) -> list[Path]:
    """Write `out/loss.png` and `out/report.html`.

    Args:
        runs: run folders, or schedules' folders, which stand for their stages.
        out: folder; its two files are replaced.

    Returns:
        The files.

    Raises:
        ConfigError: no run folder, none with a row of metrics, or no folder to write to.
    """
    folders = _named(RunFolder(path) for given in runs for path in stage_folders(given))
    settings = {name: flat(run.read_config()) for name, run in folders.items()}
    metrics = {name: read_metrics(run.metrics_file) for name, run in folders.items()}
    if not any(metrics.values()):
        raise ConfigError(f"nothing to report: no metrics yet in {', '.join(map(str, runs))}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: choose a folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    plot, html = out / "loss.png", out / "report.html"
    plot_runs(metrics, plot, _starts(runs, folders, metrics))
    parts = [f"<h1>{escape(', '.join(metrics))}</h1>", image(plot, "loss curves")]
    parts += ["<h2>Runs</h2>", _summary(metrics), "<h2>Samples</h2>"]
    parts += [_samples(name, run) for name, run in folders.items()]
    parts += ["<h2>Settings</h2>", settings_table(settings)]
    html.write_text(page("stdit report", parts))
    return [plot, html]


def _named(runs: Iterable[RunFolder]) -> dict[str, RunFolder]:
    """Runs by their folders' names, or paths where two have the same; one that is given twice counts once."""
    different = list({run.path.resolve(): run for run in runs}.values())
    names = [_name(run) for run in different]
    return {name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, different, strict=True)}


def _starts(
    runs: list[Path], folders: dict[str, RunFolder], metrics: dict[str, list[dict[str, float]]]
) -> dict[str, int]:
    """Steps that were done before each run: of the stages before it, where its schedule is what was asked for."""
    names = {run.path.resolve(): name for name, run in folders.items()}
    starts: dict[str, int] = {}
    for given in runs:
        done = 0
        for stage in stage_folders(given):
            name = names[stage.resolve()]
            starts.setdefault(name, done)
            done += int(metrics[name][-1]["step"]) if metrics[name] else 0
    return starts


def _name(run: RunFolder) -> str:
    path = run.path.resolve()
    return f"{path.parent.name}/{path.name}" if (path.parent / SCHEDULE_FILE).is_file() else path.name


def _summary(metrics: dict[str, list[dict[str, float]]]) -> str:
    columns = ("loss", "validation_loss", "samples_per_second", "memory_gib")
    body = ""
    for name, rows in metrics.items():
        cells = [f"{rows[-1]['step'] if rows else 0:,}"]
        for column in columns:
            values = [row[column] for row in rows if column in row]
            cells.append(f"{values[-1]:.4g}" if values else "")
        body += row([name, *cells])
    titles = (column.replace("_", " ").replace("gib", "(GiB)") for column in columns)
    return table(["run", "steps", *(f"last {title}" for title in titles)], body)


def _samples(name: str, run: RunFolder) -> str:
    """Videos in rows by step, the sheets that the run drew beside them being left out."""
    by_step: dict[int, list[Path]] = {}
    for file in sorted(run.samples.glob("step-*-*.mp4")):
        match = re.fullmatch(r"step-(\d+)-\d+", file.stem)
        if match:
            by_step.setdefault(int(match[1]), []).append(file)
    steps = sorted(by_step)
    if len(steps) > SHOWN_STEPS:
        steps = sorted({steps[round(i * (len(steps) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)})
    prompts = sampled_prompts(run)
    html = f"<h3>{escape(name)}</h3>" + ("" if steps else "<p>none yet</p>")
    for step in steps:
        html += f"<p>step {step:,}</p>"
        for i, file in enumerate(by_step[step]):
            caption = prompts[i] if i < len(prompts) else ""
            html += video(file, caption)
    return html


def sampled_prompts(run: RunFolder) -> list[str]:
    """What the samples of a run show, in order."""
    file = run.samples / "prompts.txt"
    return file.read_text().splitlines() if file.is_file() else []


def settings_table(settings: dict[str, dict[str, Any]]) -> str:
    """A row a setting, those that differ first."""
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    differing = [key for key in keys if len({repr(values.get(key)) for values in settings.values()}) > 1]
    body = ""
    for key in [*differing, *(key for key in keys if key not in differing)]:
        cells = [str(values.get(key, "")) for values in settings.values()]
        body += row([key, *cells], "differs" if key in differing else "")
    return table(["setting", *settings], body)
