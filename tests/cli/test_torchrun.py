"""Two processes under torchrun: killed and started again by it; a last save where an error ends both, or one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATIENCE = 300  # seconds, for a machine that has other things to do
WORKER = Path(__file__).with_name("failing_worker.py")
TRAIN = [
    "train", "--batch", "4", "--steps", "12", "--resume", "auto", "--set", "data.clips=8", "--set", "data.frames=4",
    "--set", "data.height=32", "--set", "data.width=32", "--set", "sampling.steps=1", "--set", "model.depth=1", "--set",
    "model.hidden_size=16", "--set", "log_every=1", "--set", "precision=fp32",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def torchrun(*arguments: str, restarts: int = 0) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    return [*launcher, *arguments]


def finished(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def losses(run: str) -> dict[int, float]:
    """The loss of each step; one that was done again had the same."""
    found: dict[int, float] = {}
    for line in Path(run, "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            assert found.setdefault(row["step"], row["loss"]) == row["loss"], row
    return found


def checkpoints(run: str) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in Path(run, "checkpoints").glob("step-*"))


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    """The processes that train, by rank."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        variables = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in v)
        if "RANK" in variables:
            found[int(variables["RANK"])] = int(pid)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again_and_nothing_is_lost(rank: int) -> None:
    train = [*TRAIN, "--set", "checkpoint_every=2", "--set", "steps=60"]
    command = torchrun("-m", "stdit_cli", *train, "--out", "run", restarts=1)
    with Path("log").open("w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, text=True, start_new_session=True)
    try:
        end = time.monotonic() + PATIENCE
        while launcher.poll() is None and time.monotonic() < end and 4 not in checkpoints("run"):
            time.sleep(0.05)
        assert launcher.poll() is None, Path("log").read_text()[-4000:]
        os.kill(workers(launcher)[rank], signal.SIGKILL)
        assert launcher.wait(PATIENCE) == 0, Path("log").read_text()[-4000:]
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    told = Path("log").read_text()
    assert "resuming from run/checkpoints/step-" in told
    assert "done: 60 steps" in told
    finished(torchrun("-m", "stdit_cli", *train, "--out", "whole"))
    assert losses("run") == losses("whole")


def test_an_error_in_both_processes_ends_in_a_last_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "6 01")
    command = torchrun(str(WORKER), *TRAIN, "--out", "run")
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode != 0
    assert "ZeroDivisionError: in the loss" in done.stderr
    assert "an error ends the run after step 5, which is saved" in done.stdout + done.stderr
    assert checkpoints("run") == [5]
    told = finished(torchrun("-m", "stdit_cli", *TRAIN, "--out", "run"))
    assert "resuming from run/checkpoints/step-000005" in told
    finished(torchrun("-m", "stdit_cli", *TRAIN, "--out", "whole"))
    assert losses("run") == losses("whole")


def test_an_error_in_one_process_ends_all_and_leaves_whole_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "6 1")
    begun, train = time.monotonic(), [*TRAIN, "--set", "checkpoint_every=2", "--out", "run"]
    command = torchrun(str(WORKER), *train)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode != 0
    assert "ZeroDivisionError: in the loss" in done.stderr
    assert time.monotonic() - begun < 120
    assert checkpoints("run") == [2, 4]
    assert "resuming from run/checkpoints/step-000004" in finished(torchrun("-m", "stdit_cli", *train))
