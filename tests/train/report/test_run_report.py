"""The page of a run: facts, curves, players, settings."""

import json
import sys
import tomllib
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch

from stdit_data.video.write import write_mp4
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import from_dict, load_stage
from stdit_train.config.schema import TrainConfig
from stdit_train.config.toml import to_toml
from stdit_train.report import plots
from stdit_train.report.html import video
from stdit_train.report.run_report import write_report
from stdit_train.tracking import sessions
from stdit_train.tracking.sessions import Session, read_sessions


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of ten steps with a sample, in no session yet."""
    run = RunFolder(tmp_path / "my <run>")
    run.create(load_stage("demo"))
    rows = [{"step": step, "loss": 1 / step, "lr_factor": step / 10} for step in range(1, 11)]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.samples.mkdir()
    write_mp4(run.samples / "step-000010-0.mp4", torch.zeros(3, 2, 64, 64), 8)
    (run.samples / "prompts.txt").write_text("a <red> circle\n")
    return run


def test_a_page_tells_when_on_what_and_with_what(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sessions, of 90 and 30 minutes: a run that was resumed in another week."""
    times = iter(["2026-01-02T03:00:00+00:00", "2026-01-02T03:00:00+00:00", "2026-01-02T04:30:00+00:00"])
    monkeypatch.setattr(sessions, "_now", lambda: next(times))
    monkeypatch.setattr(sys, "argv", ["/opt/bin/stdit", "train", "--out", "my <run>"])
    first = Session(run, torch.device("cpu"), 1)
    first.save()
    times = iter(["2026-01-09T03:00:00+00:00", "2026-01-09T03:30:00+00:00"])
    monkeypatch.setattr(sys, "argv", ["/src/stdit_cli/__main__.py", "train", "--resume", "my <run>"])
    Session(run, torch.device("cpu"), 2)
    assert len(read_sessions(run)) == 2
    _, page = write_report([run.path], tmp_path / "out")
    html = page.read_text()
    text = unescape(html)
    assert "2026-01-02 03:00 to 2026-01-09 03:30 UTC" in text
    assert "2:00:00, in 2 sessions" in text
    assert "stdit train --out 'my <run>'; python -m stdit_cli train --resume 'my <run>'" in text
    assert "my <run>" not in html  # escaped everywhere
    assert f"torch {torch.__version__}, " in text
    assert f"python {sys.version.split()[0]}" in text
    assert "2 processes, each on CPU" in text
    assert "10, not finished" in text


def test_runs_of_older_versions_have_no_date(run: RunFolder, tmp_path: Path) -> None:
    _, page = write_report([run.path], tmp_path / "out")
    assert "not recorded: trained with an older version" in page.read_text()


def test_settings_are_toml_that_can_be_read_back(run: RunFolder, tmp_path: Path) -> None:
    html = write_report([run.path], tmp_path / "out")[1].read_text()
    text = unescape(html.partition("<pre>")[2].partition("</pre>")[0])
    assert "patch_size = [1, 2, 2]\n" in text and "cache_latents = true\n" in text and "None" not in text
    assert from_dict(tomllib.loads(text)) == from_dict(run.read_config())


def test_toml_of_odd_values() -> None:
    values = {"a": 'x "y" \\ ü\n\x7f', "b": {"c": float("inf"), "d": None, "e": [1.5, 1e-05], "f": 1e38}, "g": False}
    del values["b"]["d"]  # type: ignore[attr-defined]
    assert tomllib.loads(to_toml(values)) == values
    assert to_toml({"a": 1, "b": {"c": None}}) == "a = 1\n\n[b]\n"


def test_runs_side_by_side_show_what_differs(run: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    other.create(replace(load_stage("demo"), steps=7, compile=True))
    html = write_report([run.path, other.path], tmp_path / "out")[1].read_text()
    rows = [part.partition("</tr>")[0] for part in html.split('<tr class="differs">')[1:]]
    assert ["compile" in rows[1], "<td>false</td><td>true</td>" in rows[1], len(rows)] == [True, True, 2]
    assert html.count("<pre>") == 2


@pytest.mark.parametrize(
    ("size", "width", "small"), [((64, 64), 192, True), ((50, 80), 240, True), ((256, 256), 256, False)]
)
def test_players_show_all_of_a_small_video(tmp_path: Path, size: tuple[int, int], width: int, small: bool) -> None:
    """Enlarged by a whole factor, and without controls, which would cover it."""
    write_mp4(tmp_path / "a.mp4", torch.zeros(3, 2, *size), 8)
    html = video(tmp_path / "a.mp4", "caption")
    assert f'<figure style="width: {width}px"><video' in html
    assert ('class="small"' in html, "controls" in html) == (small, False)


def test_a_page_pauses_its_players(run: RunFolder, tmp_path: Path) -> None:
    html = write_report([run.path], tmp_path / "out")[1].read_text()
    assert html.index("pause all") < html.index("<video")
    assert 'src="http' not in html and "<link" not in html


def test_the_learning_rate_is_plotted(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Muon both rates, as the schedule scales them, over the steps of the losses."""
    figures = []
    made = plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *a: figures.append(made(*a)) or figures[-1])
    write_report([run.path], tmp_path / "out")
    (_, (losses, rates)) = figures[0]
    config: TrainConfig = load_stage("demo")
    assert [list(line.get_ydata())[-1] for line in rates.lines] == [config.optimizer.lr, config.optimizer.muon_lr]
    assert [list(line.get_ydata())[4] for line in rates.lines] == pytest.approx(
        [config.optimizer.lr / 2, config.optimizer.muon_lr / 2]
    )
    assert (rates.get_xlabel(), losses.get_xlabel(), rates.get_xlim()) == ("step", "", losses.get_xlim())


def test_a_single_step_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    made = plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *a: figures.append(made(*a)) or figures[-1])
    row = {"step": 4, "loss": 1.9, "validation_loss": 2.4}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    plots.plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "short")
    plots.plot_runs({"short": [row]}, tmp_path / "runs.png")
    (_, alone), (_, panels) = figures
    for axes in (alone, *panels):
        low, high = axes.get_ylim()
        assert axes.lines
        for line in axes.lines:
            assert line.get_marker() == "o"
            assert low < line.get_ydata()[0] < high
