"""`stdit train` and the commands around it, as a user types them: signals, schedules, plans, reports, exports."""

import io
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from stdit_cli import console as progress
from stdit_cli.console import TrainingBar, figures, plain_console
from stdit_cli.main import with_resumed_run

TINY = [
    "--batch", "2", "--set", "data.clips=4", "--set", "data.frames=2", "--set", "data.height=16", "--set",
    "data.width=16", "--set", "sampling.steps=1", "--set", "model.depth=1", "--set", "model.hidden_size=16",
]  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_obeyed_and_told(
    stdit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    stepped = TrainingBar.stepped

    def stop(self, step: int, progress: float, values: dict) -> None:
        stepped(self, step, progress, values)
        if step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TrainingBar, "stepped", stop)
    done = stdit("train", *TINY, "--steps", "4", "--out", "my run")
    assert done.code == code, done
    assert "stopped at step 2, saved. Go on with: stdit train --resume 'my run'" in done.out
    monkeypatch.setattr(TrainingBar, "stepped", stepped)
    assert (
        "my run is of the stage demo: leave out --stage 16x256"
        in stdit("train", "--stage", "16x256", "--resume", "my run").err
    )
    done = stdit("train", "--stage", "demo", "--resume", "my run")
    assert done.code == 0, done
    assert "resuming from my run/checkpoints/step-000002" in done.out

    done = stdit("export", "my run", "out", "--raw", "--step", "2")
    assert (done.code, done.out) == (0, "wrote out: raw weights of step 2\n")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["num_frames"] == 2
    assert "not empty" in stdit("export", "my run", "out").err
    assert "no checkpoint of step 3; there are 2, 4" in stdit("export", "my run", "out2", "--step", "3").err
    done = stdit("report", "my run", "--out", "seen")
    assert (done.code, done.out) == (0, "seen/loss.png\nseen/report.html\n")
    assert "not a run folder" in stdit("report", "out").err


def test_what_cannot_be_resumed(stdit: Callable, tmp_path: Path) -> None:
    assert "missing is not a run folder: it does not exist" in stdit("train", "--resume", "missing").err
    assert "leave out --out" in stdit("train", "--resume", "a", "--out", "b").err
    (tmp_path / "runs" / "1-demo").mkdir(parents=True)
    (tmp_path / "runs" / "schedule.json").write_text("{}")
    assert (
        "runs/1-demo is a stage of a curriculum: --resume runs goes on" in stdit("train", "--resume", "runs/1-demo").err
    )
    (tmp_path / "file").write_text("mine")
    done = stdit("train", "--out", "file")
    assert (done.code, done.err) == (2, "stdit: file is a file: choose a folder with --out\n")


def test_a_bare_resume_means_the_newest() -> None:
    assert with_resumed_run(["stdit", "train", "--resume"]) == ["stdit", "train", "--resume", "newest"]
    assert with_resumed_run(["train", "--resume", "--steps", "3"]) == ["train", "--resume", "newest", "--steps", "3"]
    assert with_resumed_run(["train", "--resume", "runs/a"]) == ["train", "--resume", "runs/a"]


def test_plan(stdit: Callable) -> None:
    done = stdit("plan", "--stage", "64x512", "--gpus", "8", "--gpu", "h200")
    assert done.code == 0, done
    assert "759,620,768" in done.out
    assert "sharded (FSDP2)" in done.out
    assert "of 989 TFLOP/s" in done.out
    assert "h100" in stdit("plan", "--gpu", "h10").err


def test_dry_run_shows_the_published_model_as_a_table(stdit: Callable, tmp_path: Path) -> None:
    done = stdit("train", "--stage", "64x512", "--dry-run", "--gpu", "h100")
    assert done.code == 0, done
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert "759,620,768" in rows["parameters"]
    assert "NVIDIA H100" in rows["device"]
    assert "hours" in rows["time"]
    assert "the embedded set `shapes` stands in, with the demo's VAE and text encoder: " in done.out
    assert '"optimizer"' not in done.out
    assert '"optimizer"' in stdit("train", "--stage", "64x512", "--dry-run", "--gpu", "h100", "--verbose").out
    shown = json.loads(stdit("train", "--dry-run", "--json", "--gpu", "4090", "--set", "data.clips=9").out)
    assert (shown[0]["fits"], shown[0]["settings"]["data"]["clips"]) == (True, 9)
    assert "go with --dry-run" in stdit("train", "--json").err
    assert not list(tmp_path.iterdir())


def test_dry_run_says_what_to_change(stdit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stdit_train.hardware.available_memory", lambda: 2**32)
    out = stdit("train", "--stage", "16x256", "--dry-run").out
    assert "stage 16x256 needs about" in out
    assert "a machine with more memory" in out


def test_resume_with_the_demos_vae(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("train", *TINY, "--steps", "1", "--out", "run").code == 0
    done = stdit("train", "--resume", "run", "--vae", "demo", "--set", "steps=2")
    assert done.code == 0, done
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["vae"] == "demo"


def test_doctor(stdit: Callable) -> None:
    done = stdit("doctor")
    assert done.code == 0, done
    for word in ("device", "bfloat16", "torch 2", "HF_HUB_OFFLINE", "64x512"):
        assert word in done.out


def test_a_schedule_and_its_stages_by_name(stdit: Callable) -> None:
    assert "unknown curriculum" in stdit("train", "--schedule", "shape-progressive").err
    done = stdit("train", "--schedule", "shapes-progressive", "--set", "8x46/steps=3")
    assert (done.code, "did you mean 8x64" in done.err) == (2, True)
    assert "STAGE/KEY is for the stages of a --curriculum" in stdit("train", "--set", "8x64/steps=3").err
    assert "--curriculum shapes-progressive" in stdit("stages").out


def test_what_stands_beside_the_bar() -> None:
    values = {
        "loss": 0.5, "samples_per_second": 2.0, "tokens_per_second": 81920.0, "mfu": 0.414, "memory_gib": 61.2,
        "data_wait": 0.03,
    }  # fmt: skip
    assert figures(values, 3725.0) == (
        "loss 0.5000  2.0 samples/s  81.9k tokens/s  MFU 41%  61.2 GiB  data 3%  1:02:05 left"
    )
    assert figures(values, 3725.0, room=42) == "loss 0.5000  2.0 samples/s  1:02:05 left"
    assert figures(values, 3725.0, room=5) == "loss 0.5000"


def test_a_bar_fits_a_narrow_terminal_and_a_file_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "loss": 0.5, "samples_per_second": 2000.0, "tokens_per_second": 81920.0, "memory_gib": 61.2, "data_wait": 0.03,
    }  # fmt: skip
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    with TrainingBar(console) as bar:
        bar.started(0, 30_000)
        bar.stepped(12_345, 0.4, values)
    bars = [line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", out.getvalue()).split() if line]
    assert " ".join(bars).endswith("12345/30000 loss 0.5000 2000.0 samples/s ? left 0:00:00")

    with TrainingBar(console) as bar:
        bar.started(0, 1_000_000)
        bar.stepped(70, 0.5, values)  # half of its minutes, not of its steps
    assert " step 70 loss 0.5000" in out.getvalue()

    out = io.StringIO()
    console = plain_console()
    console.file, console.width = out, 20
    monkeypatch.setattr(progress, "TOLD_EVERY", 0.0)
    with TrainingBar(console) as bar:
        bar.started(0, 30_000)
        logging.getLogger("stdit_train.trainer").info("samples in runs/[b]a folder/of a long name")
        bar.stepped(12_345, 0.4, values)
    assert out.getvalue().splitlines()[:2] == [
        "samples in runs/[b]a folder/of a long name",
        "step 12345 of 30000: loss 0.5000  2000.0 samples/s  81.9k tokens/s  61.2 GiB  data 3%  ? left",
    ]


def test_without_wandb_nothing_is_made(stdit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = stdit("train", *TINY, "--steps", "2", "--wandb", "videos", "--out", "run")
    assert (done.code, done.err) == (
        2, "stdit: --wandb: wandb is not installed: run `uv pip install wandb`, or install stdit-cli[wandb]\n"
    )  # fmt: skip
    assert not list(tmp_path.iterdir())
