"""Schedules: what they hold, what is handed on, and going on from anywhere."""

import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stdit_train.checkpoint.format import named_tensors
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import (
    CURRICULUM_FILE,
    ConfigError,
    curriculum_names,
    load_curriculum,
    load_stage,
    read_curriculum,
    to_dict,
    write_curriculum,
)
from stdit_train.curriculum import Stage, TrainOptions, find_run, stage_folder, train_stages
from stdit_train.pipeline.export import export_run
from stdit_train.pipeline.find import find_checkpoint
from stdit_train.report import run_report as report_page
from stdit_train.report.plots import plot_losses, plot_runs, smooth
from stdit_train.report.run_report import write_report
from stdit_train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("few_validated")

TINY = {
    "steps": 4, "global_batch": 2, "checkpoint_every": 2, "log_every": 1, "validate_every": 100, "sample_every": 100,
    "model.depth": 1, "model.hidden_size": 16, "data.clips": 4, "data.frames": 2, "data.height": 16, "data.width": 16,
    "sampling.steps": 1, "16x64/data.frames": 4,
}  # fmt: skip


class Stopper:
    """Interrupts the run after a step."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def started(self, step: int, steps: int) -> None:
        pass

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_schedules() -> None:
    assert curriculum_names() == ["demo", "open-sora-1.0", "shapes-progressive"]
    published = load_curriculum("open-sora-1.0", {"init": "pixart.pth", "16x256-hq/data.source": "hq.csv"})
    assert [config.stage for config in published] == ["16x256", "16x256-hq", "16x512", "64x512"]
    assert [config.init for config in published] == ["pixart.pth", None, None, None]
    assert [config.data.source for config in published] == ["shapes", "hq.csv", "shapes", "shapes"]
    assert [config.model.space_scale for config in published] == [0.5, 0.5, 1.0, 1.0]
    small = load_curriculum("shapes-progressive")
    sizes = [(config.data.frames, config.data.height, config.data.clips) for config in small]
    assert sizes == [(8, 32, 3072), (8, 32, 1024), (8, 64, 1024), (16, 64, 1024)]
    assert [config.data.caption_noise > 0 for config in small] == [True, False, False, False]
    assert [config.model.space_scale for config in small] == [0.5, 0.5, 1.0, 1.0]
    assert [config.model.time_scale for config in small] == [0.5, 0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("shapes", {}, "unknown curriculum 'shapes'.*shapes-progressive"),
        ("shapes-progressive", {"8x46/steps": 1}, "no stage '8x46'.*did you mean 8x64"),
        ("shapes-progressive", {"8x64/step": 1}, "unknown setting 'step'.*steps"),
    ],
)
def test_a_wrong_name_is_told(name: str, overrides: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_curriculum(name, overrides)


def run(folder: Path, parts: Path, stop: dict[int, int]) -> tuple[int, bool]:
    """Start, or go on with, the small schedule; `stop` maps a stage's number to the step after which it is stopped."""
    overrides = {**TINY, "data.vae": str(parts), "data.text_encoder": str(parts)}
    if not (folder / "schedule.json").exists():
        write_curriculum(folder, "shapes-progressive", load_curriculum("shapes-progressive", overrides))
    _, configs = read_curriculum(folder, {})
    stages = [Stage(config, config, stage_folder(folder, i, config)) for i, config in enumerate(configs, 1)]
    number, outcome = train_stages(stages, lambda i, _: Stopper(stop.get(i)))
    if outcome is not None and not outcome.finished:
        assert outcome.signal == signal.SIGTERM
    return number, outcome is None or outcome.finished


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from stdit_train.build import open_trainer

    config = read_curriculum(folder, {})[1][-1]
    trainer = open_trainer(config, config, RunFolder(folder / "4-16x64"), Stopper(None))
    return named_tensors(trainer.model, trainer.ema.model, trainer.optimizers)


def test_going_on_from_anywhere(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in each stage, in its last step and while its result is written: at the end all is as without a stop."""
    handed: list[tuple[str, bool]] = []
    init_from_run = Trainer.init_from_run

    def watched(self: Trainer, previous) -> None:
        init_from_run(self, previous)
        same = all(torch.equal(a, b) for a, b in zip(self.model.parameters(), self.ema.model.parameters(), strict=True))
        handed.append((previous.path.name, same))

    monkeypatch.setattr(Trainer, "init_from_run", watched)
    assert run(tmp_path / "whole", parts, {}) == (4, True)
    assert handed == [("1-8x32", False), ("2-8x32-hq", False), ("3-8x64", False)]  # the average is one of its own
    assert run(tmp_path / "parts", parts, {1: 3}) == (1, False)
    assert run(tmp_path / "parts", parts, {1: 4}) == (1, False)  # its last step
    with monkeypatch.context() as patch:
        finish = Trainer.finish
        patch.setattr(Trainer, "finish", lambda self: (os.kill(os.getpid(), signal.SIGTERM), finish(self)))
        assert run(tmp_path / "parts", parts, {}) == (2, False)
    assert run(tmp_path / "parts", parts, {3: 1}) == (3, False)
    assert run(tmp_path / "parts", parts, {4: 2}) == (4, False)
    assert run(tmp_path / "parts", parts, {}) == (4, True)
    expected, actual = (final_tensors(tmp_path / name) for name in ("whole", "parts"))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name

    starts: list[dict[str, int]] = []
    monkeypatch.setattr(report_page, "plot_runs", lambda m, o, s, r: starts.append(s) or plot_runs(m, o, s, r))
    plot, page = write_report([tmp_path / "whole", tmp_path / "parts" / "4-16x64"], tmp_path / "report")
    assert list(starts[0].values()) == [0, 4, 8, 12, 0]
    assert plot.read_bytes().startswith(b"\x89PNG")
    html = page.read_text()
    assert html.count("<video") == 5 * 4
    assert html.count("data:image/png;base64,") == 1
    assert 'src="http' not in html
    assert "whole/1-8x32" in html
    assert '<tr class="differs"><td>data.frames</td>' in html

    _, configs = read_curriculum(tmp_path / "whole", {"8x32/steps": 6, "16x64/steps": 6})  # the last alone can go on
    stages = [Stage(config, config, stage_folder(tmp_path / "whole", i, config)) for i, config in enumerate(configs, 1)]
    outcomes = [train_stages(stages, lambda i, _: Stopper(None)) for _ in range(2)]
    assert [(number, outcome and outcome.step) for number, outcome in outcomes] == [(4, 6), (4, None)]
    assert stages[0].run.metadata()["finished_at_step"] == 4

    assert find_checkpoint(str(tmp_path / "parts")).source == str(tmp_path / "parts" / "4-16x64" / "pipeline")
    shutil.rmtree(tmp_path / "parts" / "4-16x64" / "pipeline")
    assert find_checkpoint(str(tmp_path / "parts")).source == str(tmp_path / "parts" / "3-8x64" / "pipeline")
    shutil.rmtree(tmp_path / "parts" / "4-16x64" / "checkpoints")
    assert export_run(RunFolder(tmp_path / "parts"), RunFolder(tmp_path / "exported")) == 4
    with pytest.raises(ConfigError, match=r"no stage '3-8x64'.*did you mean 8x64"):
        read_curriculum(tmp_path / "parts", {"3-8x64/steps": 5})


def test_a_report_needs_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_report_of_odd_runs(tmp_path: Path) -> None:
    """Without a row, with one, with values that are not finite, with what is no row, of one name, and given twice."""
    lines = {
        "empty": "",
        "one": '{"step": 20, "loss": 1.0}\n',
        "wild": '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 0.5}\n{"step": 3, "validation_loss": Infinity}\n',
        "all wild": '{"step": 1, "loss": NaN}\n',
        "else/one": '[1, 2]\n{"loss": 1.0}\n{"step": 5, "loss": 0.0}\n{"step": 6, "lo',
    }
    for name, rows in lines.items():
        run = RunFolder(tmp_path / name)
        run.create(load_curriculum("shapes-progressive")[0])
        run.metrics_file.write_text(rows)
    runs = [tmp_path / name for name in lines]
    with pytest.raises(ConfigError, match=r"no metrics yet in .*empty"):
        write_report(runs[:1], tmp_path / "out")
    plot, page = write_report([*runs, *runs], tmp_path / "out")
    assert plot.read_bytes().startswith(b"\x89PNG")
    titles = re.findall("<h3>(.*?)</h3>", page.read_text())
    assert titles == ["empty", str(tmp_path / "one"), "wild", "all wild", str(tmp_path / "else" / "one")]
    for run in runs:
        plot_losses(run / "metrics.jsonl", run / "loss.png", "odd")
    with pytest.raises(ConfigError, match=r"cannot create the folder .*File exists; choose another with --out"):
        write_report(runs, plot)


def test_gaps_in_a_smoothed_curve() -> None:
    assert smooth([1.0, math.nan, 1.0, math.inf]) == pytest.approx([1.0, math.nan, 1.0, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[]", "config.json is damaged: expected an object, not list"),
        ("config.json", '{"stage": "demo"}', "config.json: steps is not set"),
        ("run.json", "", "run.json is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, text: str, said: str) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(load_curriculum("shapes-progressive")[0])
    (run.path / file).write_text(text)
    with pytest.raises(ConfigError, match=said):
        run.read_config()
        run.metadata()


@pytest.mark.parametrize("resume", ["auto", "by name"])
def test_a_run_of_an_older_version_goes_on_as_it_was(tmp_path: Path, resume: str) -> None:
    """Its gradients were summed in every micro-batch, its weights shared by all processes; unless set."""
    old = to_dict(load_stage("demo", {"steps": 5, "replicate": 1}))
    del old["reduce_once"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    RunFolder(tmp_path).update_metadata(id="0")
    options = TrainOptions(resume=str(tmp_path))
    if resume == "auto":
        options = TrainOptions(stage="demo", overrides={"steps": 5}, out=tmp_path, resume="auto")
    (config,) = find_run(options).configs
    assert (config.replicate, config.reduce_once) == (1, False)
    assert load_stage("demo").reduce_once is None
    options = replace(options, overrides={**(options.overrides or {}), "reduce_once": True, "replicate": 2})
    if resume == "auto":
        with pytest.raises(ConfigError, match=r"other settings \((replicate|reduce_once): (1|False), now (2|True)\)"):
            find_run(options)
    else:
        (config,) = find_run(options).configs
        assert (config.replicate, config.reduce_once) == (2, True)


def test_a_curriculum_of_an_older_version_goes_on_as_it_was(tmp_path: Path) -> None:
    write_curriculum(tmp_path, "demo", load_curriculum("demo", {"replicate": 1}))
    saved = json.loads((tmp_path / CURRICULUM_FILE).read_text())
    for stage in saved["stages"]:
        del stage["reduce_once"]
    (tmp_path / CURRICULUM_FILE).write_text(json.dumps(saved))
    _, configs = read_curriculum(tmp_path, {})
    assert {(config.replicate, config.reduce_once) for config in configs} == {(1, False)}
