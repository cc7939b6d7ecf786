"""A report on runs: curves as PNG, and one self-contained HTML page with curves, sampled videos and settings."""

import base64
import re
from html import escape
from pathlib import Path
from typing import Any

from stdit_train.config import ConfigError
from stdit_train.metrics import read_metrics
from stdit_train.report import plot_runs
from stdit_train.run_folder import RunFolder
from stdit_train.schedule import FILE as SCHEDULE_FILE

SHOWN_STEPS = 5  # of each run's samples: the first, the last, and evenly between
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2, h3 { line-height: 1.2 } img { max-width: 100% }
table { border-collapse: collapse } td, th { border: 1px solid #ccc; padding: .2em .6em; text-align: left }
tr.differs td { background: #fff4d6 } video { width: 128px; image-rendering: pixelated; background: #eee }
figure { display: inline-block; margin: .3em; vertical-align: top; width: 128px; font-size: 12px }
figcaption { color: #555 }
"""


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
    settings = {_name(run): _flat(run.read_config()) for run in folders}
    metrics = {_name(run): read_metrics(run.metrics_file) for run in folders}
    for name, rows in metrics.items():
        if not rows:
            raise ConfigError(f"run {name} has no metrics yet: nothing to report")
    out.mkdir(parents=True, exist_ok=True)
    plot, page = out / "loss.png", out / "report.html"
    plot_runs(metrics, plot)
    parts = [f"<h1>{escape(', '.join(metrics))}</h1>", f'<img alt="loss curves" src="{_inline(plot, "image/png")}">']
    parts += ["<h2>Runs</h2>", _summary(metrics), "<h2>Samples</h2>"]
    parts += [_samples(run) for run in folders]
    parts += ["<h2>Settings</h2>", _settings(settings)]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>stdit report</title><style>{_STYLE}</style>'
    page.write_text(f"{head}<body>{''.join(parts)}</body></html>\n")
    return [plot, page]


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
        body += _row([name, *cells])
    return _table(["run", "steps", *(f"last {column.replace('_', ' ')}" for column in columns)], body)


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
    prompts = _prompts(run)
    html = f"<h3>{escape(_name(run))}</h3>" + ("" if steps else "<p>none yet</p>")
    for step in steps:
        html += f"<p>step {step:,}</p>"
        for i, file in enumerate(by_step[step]):
            caption = escape(prompts[i]) if i < len(prompts) else ""
            video = f'<video autoplay loop muted playsinline controls src="{_inline(file, "video/mp4")}"></video>'
            html += f"<figure>{video}<figcaption>{caption}</figcaption></figure>"
    return html


def _prompts(run: RunFolder) -> list[str]:
    file = run.samples / "prompts.txt"
    return file.read_text().splitlines() if file.is_file() else []


def _settings(settings: dict[str, dict[str, Any]]) -> str:
    """A row a setting, those that differ first."""
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    differing = [key for key in keys if len({repr(values.get(key)) for values in settings.values()}) > 1]
    body = ""
    for key in [*differing, *(key for key in keys if key not in differing)]:
        cells = [str(values.get(key, "")) for values in settings.values()]
        body += _row([key, *cells], "differs" if key in differing else "")
    return _table(["setting", *settings], body)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _table(head: list[str], body: str) -> str:
    return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{body}</table>"


def _row(cells: list[str], kind: str = "") -> str:
    return f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'


def _inline(file: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
