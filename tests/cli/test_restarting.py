"""One command for starts and restarts (`--resume auto`), folders in use, and exit codes that launchers understand."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from stdit_cli.commands.train.run import stopped_code
from stdit_cli.console import TrainingBar
from stdit_train.distributed.launch import LAUNCHED

TINY = [
    "--batch", "2", "--set", "data.clips=4", "--set", "data.frames=2", "--set", "data.height=16", "--set",
    "data.width=16", "--set", "sampling.steps=1", "--set", "model.depth=1", "--set", "model.hidden_size=16",
]  # fmt: skip


def test_one_command_starts_resumes_and_ends(stdit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = TrainingBar.stepped

    def stop(self, step: int, progress: float, values: dict) -> None:
        stepped(self, step, progress, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    command = ["train", *TINY, "--steps", "4", "--out", "run", "--resume", "auto"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").touch()  # killed before it had begun
    monkeypatch.setattr(TrainingBar, "stepped", stop)
    done = stdit(*command)
    assert (done.code, "stopped at step 2, saved" in done.out) == (143, True), done
    assert not (tmp_path / "run" / "pipeline").exists()
    assert "`stdit export run OUT`" in stdit("sample", "a circle", "--checkpoint", "run").err
    monkeypatch.setattr(TrainingBar, "stepped", stepped)
    done = stdit(*command)
    assert (done.code, "resuming from run/checkpoints/step-000002" in done.out) == (0, True), done
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    done = stdit(*command)
    assert (done.code, "run is finished, with 4 steps" in done.out) == (0, True), done

    done = stdit(*command, "--set", "optimizer.lr=0.5")
    assert done.code == 2
    assert "run holds a run with other settings (optimizer.lr: " in done.err
    assert "now 0.5): choose another folder with --out" in done.err
    done = stdit("train", "--curriculum", "shapes-progressive", "--out", "run", "--resume", "auto")
    assert (done.code, "is of the stage demo" in done.err) == (2, True), done
    assert "give it with --out" in stdit("train", "--resume", "auto").err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").touch()
    assert "other is not empty" in stdit("train", *TINY, "--out", "other", "--resume", "auto").err


def test_a_stop_is_no_failure_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes every code but 0 for one; a shell, and our own launcher, are told the signal."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv(LAUNCHED, raising=False)
    assert stopped_code(signal.SIGTERM) == 143
    assert stopped_code(None) == 130
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert stopped_code(signal.SIGTERM) == 0
    monkeypatch.setenv(LAUNCHED, "1")
    assert stopped_code(signal.SIGTERM) == 143
