"""A report on runs: curves as PNG, and one self-contained HTML page with curves, sampled videos and settings."""

import re
from html import escape
from pathlib import Path
from typing import Any

from stdit_train.config import ConfigError
from stdit_train.metrics import read_metrics
from stdit_train.page import image, page, row, table, video
from stdit_train.report import plot_runs
from stdit_train.run_folder import RunFolder
from stdit_train.schedule import FILE as SCHEDULE_FILE

SHOWN_STEPS = 5  # of each run's samples: the first, the last, and evenly between


def write_report(runs: list[Path], out: Path) -> list[Path]:
    """Write `out/loss.png` and `out/report.html`.

    Args:
        runs: run folders, or schedules' folders, which stand for their stages.
        out: folder; its two files are replaced.

    Returns:
        The files.

    Raises:
        ConfigError: no run folder, or one without a single row of metrics.
    """
    folders = [RunFolder(path) for given in runs for path in _stages(given)]
    settings = {_name(run): flat(run.read_config()) for run in folders}
    metrics = {_name(run): read_metrics(run.metrics_file) for run in folders}
    for name, rows in metrics.items():
        if not rows:
            raise ConfigError(f"run {name} has no metrics yet: nothing to report")
    out.mkdir(parents=True, exist_ok=True)
    plot, html = out / "loss.png", out / "report.html"
    plot_runs(metrics, plot)
    parts = [f"<h1>{escape(', '.join(metrics))}</h1>", image(plot, "loss curves")]
    parts += ["<h2>Runs</h2>", _summary(metrics), "<h2>Samples</h2>"]
    parts += [_samples(run) for run in folders]
    parts += ["<h2>Settings</h2>", settings_table(settings)]
    html.write_text(page("stdit report", parts))
    return [plot, html]


def _stages(path: Path) -> list[Path]:
    if not (path / SCHEDULE_FILE).is_file():
        return [path]
    stages = [stage for stage in path.iterdir() if (stage / "config.json").is_file()]
    return sorted(stages, key=lambda stage: int(stage.name.partition("-")[0]))


def _name(run: RunFolder) -> str:
    path = run.path.resolve()
    return f"{path.parent.name}/{path.name}" if (path.parent / SCHEDULE_FILE).is_file() else path.name


def _summary(metrics: dict[str, list[dict[str, float]]]) -> str:
    columns = ("loss", "validation_loss", "samples_per_second", "memory_gib")
    body = ""
    for name, rows in metrics.items():
        cells = [f"{rows[-1]['step']:,}"]
        for column in columns:
            values = [row[column] for row in rows if column in row]
            cells.append(f"{values[-1]:.4g}" if values else "")
        body += row([name, *cells])
    return table(["run", "steps", *(f"last {column.replace('_', ' ')}" for column in columns)], body)


def _samples(run: RunFolder) -> str:
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
    html = f"<h3>{escape(_name(run))}</h3>" + ("" if steps else "<p>none yet</p>")
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


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
