"""Report runs: loss curves as PNG, and one self-contained HTML page with curves, samples and settings."""

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from stdit_data.files import replace_text
from stdit_train.checkpoint.run_folder import RunFolder, stage_folders
from stdit_train.config.load import CURRICULUM_FILE, flatten
from stdit_train.errors import ConfigError
from stdit_train.report.html import image, page, row, table, video
from stdit_train.report.plots import plot_runs
from stdit_train.tracking.metrics import read_metrics

SHOWN_STEPS = 5  # per run, with samples: the first, the last, and evenly between


def write_report(runs: list[Path], out: Path) -> list[Path]:
    """Write `out/loss.png` and `out/report.html`.

    Args:
        runs: run folders, or folders of schedules, which stand for their stages.
        out: folder to write to; created if it does not exist.

    Returns:
        Paths of the files.

    Raises:
        ConfigError: a path is not a run folder, no run has metrics, or `out` is not a folder.
    """
    folders = _named(RunFolder(path) for given in runs for path in stage_folders(given))
    settings = {name: flatten(run.read_config()) for name, run in folders.items()}
    metrics = {name: read_metrics(run.metrics_file) for name, run in folders.items()}
    if not any(metrics.values()):
        raise ConfigError(f"nothing to report: no metrics yet in {', '.join(map(str, runs))}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create the folder {out}: {error.strerror}; choose another with --out") from error
    plot, html = out / "loss.png", out / "report.html"
    plot_runs(metrics, plot, _starts(runs, folders, metrics))
    parts = [f"<h1>{escape(', '.join(metrics))}</h1>", image(plot, "loss curves")]
    parts += ["<h2>Runs</h2>", _summary(metrics), "<h2>Samples</h2>"]
    parts += [_samples(name, run) for name, run in folders.items()]
    parts += ["<h2>Settings</h2>", settings_table(settings)]
    replace_text(html, page("stdit report", parts))
    return [plot, html]


def sampled_prompts(run: RunFolder) -> list[str]:
    """Read the prompts of a run's samples, in order."""
    file = run.samples / "prompts.txt"
    return file.read_text().splitlines() if file.is_file() else []


def settings_table(settings: dict[str, dict[str, Any]]) -> str:
    """Return a table with a row per setting, those that differ first, and a column per run."""
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    differing = [key for key in keys if len({repr(values.get(key)) for values in settings.values()}) > 1]
    body = ""
    for key in [*differing, *(key for key in keys if key not in differing)]:
        cells = [str(values.get(key, "")) for values in settings.values()]
        body += row([key, *cells], "differs" if key in differing else "")
    return table(["setting", *settings], body)


def _named(runs: Iterable[RunFolder]) -> dict[str, RunFolder]:
    """Name runs by their folders, or paths where two folders have one name; a run given twice counts once."""
    different = list({run.path.resolve(): run for run in runs}.values())
    names = [_name(run) for run in different]
    return {name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, different, strict=True)}


def _starts(
    runs: list[Path], folders: dict[str, RunFolder], metrics: dict[str, list[dict[str, float]]]
) -> dict[str, int]:
    """Return the steps before each run: those of the earlier stages, where a schedule's folder was given."""
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
    return f"{path.parent.name}/{path.name}" if (path.parent / CURRICULUM_FILE).is_file() else path.name


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
    """Show a run's sampled videos, a row per step."""
    by_step: dict[int, list[Path]] = {}
    for file in sorted(run.samples.glob("step-*-*.mp4")):
        match = re.fullmatch(r"step-(\d+)-\d+", file.stem)
        if match:
            by_step.setdefault(int(match[1]), []).append(file)
    steps = sorted(by_step)
    if len(steps) > SHOWN_STEPS:
        steps = sorted({steps[round(i * (len(steps) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)})
    prompts = sampled_prompts(run)
    html = f"<h3>{escape(name)}</h3>" + ("" if steps else "<p>no samples yet</p>")
    for step in steps:
        html += f"<p>step {step:,}</p>"
        for i, file in enumerate(by_step[step]):
            caption = prompts[i] if i < len(prompts) else ""
            html += video(file, caption)
    return html
