"""Report runs: curves as PNG, and one self-contained HTML page with facts, curves, samples and settings."""

import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from typing import Any

from stdit_data.storage.atomic import replace_text
from stdit_train.checkpoint.run_folder import RunFolder, stage_folders
from stdit_train.config.load import CURRICULUM_FILE, flatten
from stdit_train.config.toml import to_toml, toml_value
from stdit_train.errors import ConfigError
from stdit_train.report.html import image, listing, page, player_controls, row, table, video
from stdit_train.report.plots import plot_runs
from stdit_train.tracking.metrics import read_metrics
from stdit_train.tracking.sessions import read_sessions

LAST = {  # metrics whose last value is told, with their titles
    "loss": "last training loss",
    "validation_loss": "last validation loss",
    "validation_psnr": "last validation PSNR, dB",
    "validation_ssim": "last validation SSIM",
    "samples_per_second": "last samples per second",
    "memory_gib": "last memory, GiB",
}
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
    settings = {name: run.read_config() for name, run in folders.items()}
    metrics = {name: read_metrics(run.metrics_file) for name, run in folders.items()}
    if not any(metrics.values()):
        raise ConfigError(f"nothing to report: no metrics yet in {', '.join(map(str, runs))}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create the folder {out}: {error.strerror}; choose another with --out") from error
    plot, html = out / "loss.png", out / "report.html"
    rates = {name: _rates(values["optimizer"]) for name, values in settings.items()}
    plot_runs(metrics, plot, _starts(runs, folders, metrics), rates)
    parts = [f"<h1>{escape(', '.join(metrics))}</h1>", _facts(folders, metrics)]
    parts += ["<h2>Curves</h2>", image(plot, "training loss, validation loss and learning rate over the steps")]
    parts += ["<h2>Samples</h2>", player_controls()]
    parts += [_samples(name, run) for name, run in folders.items()]
    parts += ["<h2>Settings</h2>", settings_section(settings)]
    replace_text(html, page(f"{', '.join(metrics)}: stdit report", parts))
    return [plot, html]


def sampled_prompts(run: RunFolder) -> list[str]:
    """Read the prompts of a run's samples, in order."""
    file = run.samples / "prompts.txt"
    return file.read_text().splitlines() if file.is_file() else []


def settings_section(configs: dict[str, dict[str, Any]]) -> str:
    """Return the settings of runs, by name: a table of those that differ, and the TOML of each."""
    settings = {name: flatten(values) for name, values in configs.items()}
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    body = ""
    for key in keys:
        values = [each.get(key) for each in settings.values()]
        if len(set(map(repr, values))) > 1:
            body += row([key, *("" if value is None else toml_value(value) for value in values)], "differs")
    html = table(["setting", *settings], body) if body else ""
    return html + "".join(listing(to_toml(values), name, len(configs) == 1) for name, values in configs.items())


def sessions_facts(runs: Iterable[RunFolder]) -> dict[str, str]:
    """Return when and with what runs were trained, by the name of the fact; empty for runs of an older version."""
    sessions = sorted((s for run in runs for s in read_sessions(run)), key=lambda session: session["started"])
    if not sessions:
        return {}
    times = [[datetime.fromisoformat(session[key]) for key in ("started", "ended")] for session in sessions]
    seconds = sum((ended - started).total_seconds() for started, ended in times)
    resumed = f", in {len(sessions)} sessions" if len(sessions) > 1 else ""
    versions = [", ".join(f"{name} {number}" for name, number in s["versions"].items()) for s in sessions]
    return {
        "date": f"{times[0][0]:%Y-%m-%d %H:%M} to {max(ended for _, ended in times):%Y-%m-%d %H:%M} UTC",
        "duration": f"{timedelta(seconds=round(seconds))}{resumed}",
        "machine": "; ".join(dict.fromkeys(session["machine"] for session in sessions)),
        "versions": "; ".join(dict.fromkeys(versions)),
        "command": "; ".join(dict.fromkeys(session["command"] for session in sessions)),
    }


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


def _rates(optimizer: dict[str, Any]) -> list[float]:
    return [optimizer["lr"], *([optimizer["muon_lr"]] if optimizer["name"] == "muon" else [])]


def _facts(folders: dict[str, RunFolder], metrics: dict[str, list[dict[str, float]]]) -> str:
    """Return a table with a row per fact, and a column per run."""
    facts: dict[str, dict[str, str]] = {}
    for name, run in folders.items():
        rows = metrics[name]
        facts[name] = {"steps": f"{int(rows[-1]['step']) if rows else 0:,}{'' if run.finished else ', not finished'}"}
        for column, title in LAST.items():
            values = [each[column] for each in rows if column in each]
            facts[name] |= {title: f"{values[-1]:.4g}"} if values else {}
        facts[name] |= sessions_facts([run]) or {"date": "not recorded: trained with an older version"}
    titles = dict.fromkeys(title for each in facts.values() for title in each)
    body = "".join(row([title, *(each.get(title, "") for each in facts.values())]) for title in titles)
    return table(["run", *facts], body)


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
