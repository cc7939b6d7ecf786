"""`stdit train` and the commands around it, as a user types them: signals, schedules, plans, reports, exports."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stdit_cli.console import TrainingBar
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
    assert "stopped at step 2, saved. Resume with: stdit train --resume 'my run'" in done.out
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
        "runs/1-demo is a stage of a curriculum: resume that with --resume runs"
        in stdit("train", "--resume", "runs/1-demo").err
    )
    (tmp_path / "file").write_text("mine")
    done = stdit("train", "--out", "file")
    assert (done.code, done.err) == (2, "stdit: file is a file: choose a folder with --out\n")


def test_a_finished_run_says_so_before_anything_is_loaded(
    stdit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = stdit("train", *TINY, "--steps", "3", "--out", "run")
    assert done.code == 0, done
    assert re.search(r"try it: stdit sample '[a-z ]+' --checkpoint run\n", done.out)
    settings = (tmp_path / "run" / "config.json").read_bytes()
    monkeypatch.setattr("stdit_train.components.load.load_components", lambda *_: pytest.fail("loaded"))
    done = stdit("train", "--resume", "run", "--set", "optimizer.lr=1e-5")
    assert (done.code, done.out) == (
        0,
        "run is finished, with 3 steps: nothing is left to do\ntrain longer with: stdit train --resume run --steps 6\n",
    )
    done = stdit("train", "--resume", "run", "--steps", "2")
    assert (done.code, done.err) == (2, "stdit: run has done 3 steps, --steps 2 is less: give more than 3\n")
    assert "not empty" in stdit("train", *TINY, "--steps", "3", "--out", "run").err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "run is finished" in stdit("train", "--resume", "run").out
    done = stdit("train", "--resume", "run", "--steps", "5")
    assert (done.code, "start a new run from its weights with --init run" in done.err) == (2, True)
    assert (tmp_path / "run" / "config.json").read_bytes() == settings


def test_a_run_of_minutes_is_finished_when_they_are_over(stdit: Callable, tmp_path: Path) -> None:
    budget = ["--steps", "1000000", "--minutes", "0.001"]
    done = stdit("train", *TINY, *budget, "--out", "run")
    assert done.code == 0, done
    step = json.loads((tmp_path / "run" / "run.json").read_text())["finished_at_step"]
    done = stdit("train", "--resume", "run")
    assert (done.code, f"run is finished, with {step} steps" in done.out) == (0, True), done
    assert "train longer with: stdit train --resume run --minutes 0.002" in done.out
    done = stdit("train", "--resume", "run", "--minutes", "0.0001")
    assert (done.code, "--minutes 0.0001 is less: give more" in done.err) == (2, True), done
    minutes = json.loads((tmp_path / "run" / "checkpoints" / f"step-{step:06}" / "state.json").read_text())["elapsed"]
    done = stdit("train", "--resume", "run", "--minutes", str(minutes / 60 + 0.001))
    assert (done.code, "resuming from" in done.out) == (0, True), done


def test_a_finished_curriculum_says_so(stdit: Callable, tmp_path: Path) -> None:
    small = ["--set", "data.frames=2", "--set", "data.height=16", "--set", "data.width=16", *TINY]
    done = stdit("train", "--curriculum", "shapes-progressive", *small, "--steps", "1", "--out", "run")
    assert done.code == 0, done
    saved = (tmp_path / "run" / "schedule.json").read_bytes()
    done = stdit("train", "--resume", "run")
    assert (done.code, "run is finished, with 4 stages, the last with 1 steps" in done.out) == (0, True), done
    assert "train longer with: stdit train --resume run --set 16x64/steps=2" in done.out
    assert (tmp_path / "run" / "schedule.json").read_bytes() == saved


def test_another_data_set_names_the_option_that_begins_anew(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("train", *TINY, "--steps", "1", "--out", "run").code == 0
    settings = (tmp_path / "run" / "config.json").read_bytes()
    done = stdit("train", "--resume", "run", "--steps", "2", "--set", "data.clips=6")
    assert done.code == 2
    assert "samples is 4 in the state and 6 here" in done.err
    assert "--init run starts one from this run's weights, with the data anew" in done.err
    assert (tmp_path / "run" / "config.json").read_bytes() == settings
    done = stdit("train", *TINY, "--steps", "1", "--set", "data.clips=6", "--init", "run", "--out", "other")
    assert done.code == 0, done


def test_a_bare_resume_means_the_newest() -> None:
    assert with_resumed_run(["stdit", "train", "--resume"]) == ["stdit", "train", "--resume", "newest"]
    assert with_resumed_run(["train", "--resume", "--steps", "3"]) == ["train", "--resume", "newest", "--steps", "3"]
    assert with_resumed_run(["train", "--resume", "runs/a"]) == ["train", "--resume", "runs/a"]


def test_reports_show_a_bare_resume_as_typed(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("train", *TINY, "--steps", "1", "--out", "run").code == 0
    assert stdit("train", "--out", "run", "--steps", "2", "--resume").code == 0
    sessions = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert sessions[1]["command"].endswith("train --out run --steps 2 --resume")


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
    assert "per step" in rows["time"] and "days" in rows["time"]
    assert "the embedded set `shapes` is used, with the demo's VAE and text encoder: " in done.out
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


def test_without_wandb_nothing_is_made(stdit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = stdit("train", *TINY, "--steps", "2", "--wandb", "videos", "--out", "run")
    assert (done.code, done.err) == (
        2, "stdit: --wandb: wandb is not installed: run `uv pip install wandb`, or install stdit-cli[wandb]\n"
    )  # fmt: skip
    assert not list(tmp_path.iterdir())
