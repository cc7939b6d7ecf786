"""`stdit train --nproc` as a user types it: stopping, dying, going on, refusing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = [
    "--batch", "4", "--set", "data.clips=8", "--set", "data.frames=4", "--set", "data.height=32", "--set",
    "data.width=32", "--set", "sampling.steps=1", "--set", "model.depth=1", "--set", "model.hidden_size=16",
    "--set", "checkpoint_every=2", "--set", "log_every=1",
]  # fmt: skip
PATIENCE = 300  # seconds, for a machine that has other things to do


def test_what_does_not_fit_is_refused_before_anything_starts(stdit: Callable) -> None:
    done = stdit("train", *TINY, "--nproc", "3")
    assert (done.code, done.out) == (2, "")
    assert "global batch of 4 is not a multiple of the 3 data-parallel ranks" in done.err
    done = stdit("train", *TINY, "--nproc", "8", "--set", "sequence=8")
    assert "8 processes per clip, but it has 4 frames of tokens" in done.err
    done = stdit("train", *TINY, "--nproc", "2", "--set", "precision=fp16")
    assert "precision=fp16 is for one process" in done.err
    assert not Path("runs").exists()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


def started(*arguments: str) -> subprocess.Popen[str]:
    """The command, training on two processes, a session of its own; waits until steps are logged in ./run."""
    command = [sys.executable, "-m", "stdit_cli", "train", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics, before = Path("run/metrics.jsonl"), lines_of(Path("run/metrics.jsonl"))
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end and lines_of(metrics) < before + 4:
        time.sleep(0.1)
    if process.poll() is not None or lines_of(metrics) < before + 4:
        process.kill()
        pytest.fail(f"no steps after {PATIENCE} s: {process.communicate()}")
    return process


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Of a launcher: its children that train."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "stdit_cli" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.usefixtures("folder")
def test_dying_stopping_and_going_on() -> None:
    """One of two is killed: the other ends within a minute. Resumed and told to stop: both do, after their step."""
    process = started(*TINY, "--steps", "100000", "--out", "run", "--nproc", "2")
    both = workers(process)
    assert len(both) == 2
    os.kill(both[1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 1 was ended by SIGKILL (out of memory?), and the others after it" in err
    assert "Traceback" not in err
    assert "resume with: stdit train --resume run --nproc 2" in out
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)

    process = started("--resume", "run", "--nproc", "2")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert_stopped(process.returncode, 143, out, err)
    assert "resuming from run/checkpoints/step-" in out
    assert out.count("resuming from") == 1  # one prints

    last = last_checkpoint()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "stdit_cli",
        "train", "--resume", "run", "--set", f"steps={last + 2}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert f"done: {last + 2} steps" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.usefixtures("folder")
def test_ctrl_c() -> None:
    """As a terminal sends it: to everything that runs in it. The second doesn't wait for the step, or the save."""
    process = started(*TINY, "--steps", "100000", "--out", "run", "--nproc", "2")
    both = workers(process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert_stopped(process.returncode, 130, out, err)
    assert last_checkpoint() >= 4
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)

    process = started("--resume", "run", "--nproc", "2")
    both = workers(process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout is not None
    assert any("again to stop immediately" in line for line in process.stdout)  # reads up to there
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err.replace("stdit: interrupted\n", "")) == (130, "")
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)


def assert_stopped(code: int, expected: int, out: str, err: str) -> None:
    assert (code, err) == (expected, ""), (out, err)
    assert out.count("stopping after this step") == 1
    assert out.count("saved. Resume with: stdit train --resume run --nproc 2") == out.count("--resume") == 1
    assert f"stopped at step {last_checkpoint()}, saved" in out


def last_checkpoint() -> int:
    return max(int(path.name[5:]) for path in Path("run/checkpoints").glob("step-*"))
