"""Plots, samples, validation and metrics may fail: the run goes on, and its log has the traceback."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit_train.build import build_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.side_work import SideWork
from stdit_train.distributed.world import World
from stdit_train.tracking.interval import StepInterval
from stdit_train.tracking.metrics import Metrics, read_metrics
from stdit_train.trainer import Trainer


def start(config: TrainConfig, folder: Path) -> Trainer:
    run = RunFolder(folder)
    run.create(config)
    return build_trainer(config, run, NullCallback())


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("stdit_train.outputs.plot_losses", "plotting"),
        ("stdit_train.task.draw_samples", "sampling"),
        ("stdit_train.loss.batch.validation_batches", "validation"),
        ("stdit_train.tracking.metrics.Metrics._append", "writing metrics"),
        ("torch.utils.tensorboard.SummaryWriter.add_scalar", "writing metrics"),
        ("stdit_train.tracking.sessions.Session.save", "recording the session"),
    ],
)
def test_a_run_outlives_its_side_work(
    small: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    target: str,
    what: str,
) -> None:
    """Everything that is not the step or a checkpoint fails from the third step on, and the run ends as it would."""
    trainer = start(replace(small, validate_every=3, sample_every=3), tmp_path / "run")
    module, name = target.rsplit(".", 1)
    owner: Any = __import__("pkgutil").resolve_name(module)
    real = getattr(owner, name)

    def broken(*arguments: Any, **named: Any) -> Any:
        if trainer.step >= 3:
            raise OSError(116, "Stale file handle")
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, broken)
    assert trainer.train().finished
    log = trainer.run.log_file.read_text()
    assert f"step 3: {what} failed (OSError: [Errno 116] Stale file handle); the run goes on" in log
    assert "Traceback (most recent call last)" in log
    assert "raise OSError(116" in log
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert all("\n" not in line for line in lines)  # what the console shows
    assert trainer.run.latest_checkpoint().state["step"] == 6
    assert (trainer.run.pipeline / "model_index.json").exists()


def test_a_line_that_the_disk_refused_is_written_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, real = Metrics(tmp_path / "metrics.jsonl", None), Path.open

    def stale(path: Path, *arguments: Any, **named: Any) -> Any:
        raise OSError(116, "Stale file handle", str(path))

    metrics.write(1, {"loss": 1.0})
    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(OSError, match="Stale"):
        metrics.write(2, {"loss": 2.0})
    monkeypatch.setattr(Path, "open", real)
    metrics.write(3, {"loss": 3.0})
    assert [row["loss"] for row in read_metrics(metrics.file)] == [1.0, 2.0, 3.0]


def test_work_that_keeps_failing_is_told_ever_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    side_work = SideWork(World())

    def fail() -> None:
        raise ValueError("no")

    for step in range(1, 10):
        assert side_work.alone("plotting", step, fail) is None
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "step 1", "step 2", "step 4", "step 8",
    ]  # fmt: skip
    assert side_work.alone("plotting", 10, lambda: 7) == 7
    side_work.alone("plotting", 11, fail)
    assert caplog.records[-1].getMessage().startswith("step 11: plotting failed (ValueError: no)")


class Another(World):
    """The second of two processes, whose peers never answer."""

    rank, size = 1, 2


def test_what_failed_between_the_parts_ends_several_processes() -> None:
    """The others wait in a collective call that this one left, so it must not go on alone."""

    def fail() -> None:
        raise RuntimeError("out of memory in a block")

    with pytest.raises(RuntimeError, match="in a block"):
        SideWork(Another()).together("validation", 1, fail)
    assert SideWork(World()).together("validation", 1, fail) is None


def not_finite(trainer: Trainer, steps: set[int]) -> None:
    """At these steps, counted from 1, the second block puts out NaN."""

    def forward(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * math.nan if trainer.step + 1 in steps and trainer.model.training else output

    trainer.model.blocks[1].mlp.fc2.register_forward_hook(forward)


def test_skipped_steps_are_counted_and_enter_no_mean(small: TrainConfig, tmp_path: Path) -> None:
    """Logged every third step: the row has the mean of the finite steps, and how many were not."""
    settings = replace(small, log_every=3, checkpoint_every=100)
    values: list[dict[str, float]] = []

    class Recorder(NullCallback):
        def stepped(self, step: int, progress: float, found: dict[str, float]) -> None:
            values.append(dict(found))

    trainer = start(settings, tmp_path / "run")
    trainer.callback = Recorder()
    not_finite(trainer, {2, 3, 5})
    trainer.train()
    text = trainer.run.metrics_file.read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows = {row["step"]: row for row in read_metrics(trainer.run.metrics_file) if "lr_factor" in row}
    assert [rows[step]["skipped"] for step in (3, 6)] == [2.0, 1.0]
    assert rows[3]["loss"] == values[0]["loss"]
    assert rows[6]["loss"] == pytest.approx((values[3]["loss"] + values[5]["loss"]) / 2)
    assert any(name.startswith("loss_t") for name in rows[3])
    assert all("loss" not in values[step - 1] for step in (2, 3, 5))


def test_a_row_is_of_all_its_steps() -> None:
    interval = StepInterval()
    interval.add({"loss": 1.0, "memory_gib": 3.0, "samples_per_second": 8.0, "lr_factor": 0.5, "repeats": 1.0}, 1.0)
    interval.add({"skipped": 1.0, "memory_gib": 2.0, "samples_per_second": 4.0}, 2.0)
    saved = interval.state_dict()
    interval.add({"loss": 2.0, "memory_gib": 1.0, "samples_per_second": 8.0, "lr_factor": 1.0, "repeats": 2.0}, 1.0)
    assert interval.take() == {
        "loss": 1.5, "memory_gib": 3.0, "samples_per_second": 6.0, "lr_factor": 1.0, "repeats": 3.0, "skipped": 1.0,
    }  # fmt: skip
    assert interval.take() == {}
    interval.load_state_dict(json.loads(json.dumps(saved)))
    assert interval.take()["samples_per_second"] == pytest.approx(16 / 3)


@pytest.mark.parametrize("finite", [True, False])
def test_metrics_hold_json(tmp_path: Path, finite: bool) -> None:
    """Also what an older version left behind: NaN, which JSON does not have."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0, "loss_t0-250": NaN}\n')
    Metrics(file, None, step=1).write(2, {"loss": 1.0 if finite else math.inf, "lr_factor": 1.0})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 2.0}, {"step": 2, **({"loss": 1.0} if finite else {}), "lr_factor": 1.0}]
