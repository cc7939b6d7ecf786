"""Two processes on a store and a disk that fail at random, killed and started again: the run is that of calm weather.

STDIT_CHAOS_MINUTES=30 makes it last longer (2 minutes by default); STDIT_CHAOS_SEED chooses other weather.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from stdit_data.video.write import write_mp4

MINUTES = float(os.environ.get("STDIT_CHAOS_MINUTES", "2"))
SEED = int(os.environ.get("STDIT_CHAOS_SEED", "0"))
STEPS = max(60, round(60 * MINUTES))
STORE_FAULTS, DISK_FAULTS = 0.05, 0.01  # shares of requests and of operations
HOW: list[int | str] = [503, 500, 429, "reset", "cut"]
WORKER = Path(__file__).with_name("chaos_worker.py")
PATIENCE = 300  # seconds for a start, or for the processes to end
ALL_STEPS = PATIENCE * max(1.0, MINUTES / 5)  # seconds for all steps without a kill


class Runs:
    """Starts the processes of a run, with records of what they do in `out`."""

    def __init__(self, url: str, folder: Path, share: float) -> None:
        self.folder, self.out, self.share, self.starts = folder, folder.with_name(f"{folder.name}-records"), share, 0
        self.out.mkdir()
        settings = {
            "data.frames": 4, "data.height": 32, "data.width": 32, "data.buckets": '["4x32x32", "4x32x48"]',
            "data.patience": 1, "sampling.steps": 1, "model.depth": 1, "model.hidden_size": 16, "precision": "fp32",
            "checkpoint_every": 5, "log_every": 1, "sample_every": 100000, "objective.name": "iddpm",
            "optimizer.name": "adamw", "optimizer.lr": 1e-3,
        }  # fmt: skip
        self.command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(WORKER), "train",
            "--data", f"{url}/set.csv", "--vae", "demo", "--text-encoder", "demo", "--batch", "4",
            "--steps", str(STEPS), "--out", str(folder), "--resume", "auto",
        ]  # fmt: skip
        for key, value in settings.items():
            self.command += ["--set", f"{key}={value}"]

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        about = {"folder": str(self.folder), "share": self.share, "seed": f"{SEED} {self.starts}", "out": str(self.out)}
        log = (self.out / f"{self.starts}.log").open("wb")
        environment = os.environ | {"CHAOS": json.dumps(about), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(self.command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def rows(self, name: str) -> list[Any]:
        """Records, without a line cut short by a kill."""
        path = self.out / name
        return (
            [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if (path.exists())
            else []
        )

    def steps(self) -> dict[int, list[Any]]:
        """What was trained on in each step, on both ranks; each time that a step was done it was the same."""
        found: dict[int, list[Any]] = {}
        for rank in (0, 1):
            own: dict[int, Any] = {}
            for step, *what in self.rows(f"steps-{rank}.jsonl"):
                assert own.setdefault(step, what) == what, f"step {step} of rank {rank} differs when done again"
            for step, what in own.items():
                found.setdefault(step, []).append(what)
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        file = self.out / "tensors.pt"
        dcp_to_torch_save(self.folder / "checkpoints" / f"step-{STEPS:06d}" / "tensors", file)
        return torch.load(file, weights_only=True)

    def end_of_log(self) -> str:
        return (self.out / f"{self.starts}.log").read_text()[-3000:]


def killed(runs: Runs, process: subprocess.Popen[bytes], numbers: random.Random) -> None:
    """Kill one process or all: mostly some seconds after its first step, sometimes while it starts."""
    before, pids = len(runs.rows("steps-0.jsonl")), len(runs.rows("pids.jsonl"))
    early, end = numbers.random() < 0.15, time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        if len(runs.rows("pids.jsonl")) == pids + 2 and (early or len(runs.rows("steps-0.jsonl")) > before):
            break
        time.sleep(0.2)
    end = time.monotonic() + numbers.uniform(0, 10)
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    if process.poll() is None and numbers.random() < 0.25:
        os.kill(numbers.choice(runs.rows("pids.jsonl")[-2:]), signal.SIGKILL)
        process.wait(PATIENCE)
    kill_all(runs, process)


def kill_all(runs: Runs, process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pid in runs.rows("pids.jsonl")[-2:]:  # torchrun gives each worker a session of its own
        try:
            if "chaos_worker" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, FileNotFoundError):
            pass
    process.wait(PATIENCE)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_run_in_bad_weather_is_that_of_a_calm_day(serve: Callable[[Path], Any], tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    clips = tmp_path / "clips"
    clips.mkdir()
    rows = []
    for number in range(14):
        t = torch.linspace(-1, 1, 20)[None, :, None, None]
        write_mp4(clips / f"{number}.mp4", (t * (number + 1) / 14).expand(3, 20, 32, 32 + 16 * (number % 2)), fps=24)
        rows.append(f"{number}.mp4,a red circle moving left")
    (clips / "set.csv").write_text("\n".join(["path,caption", *rows]) + "\n")
    store, numbers = serve(clips), random.Random(SEED)

    calm = Runs(store.url, tmp_path / "calm", 0.0)
    process = calm.start()
    try:
        assert process.wait(ALL_STEPS) == 0, calm.end_of_log()
    finally:
        kill_all(calm, process)

    def weather(number: int, path: str) -> int | str | None:
        return numbers.choice(HOW) if numbers.random() < STORE_FAULTS else None

    store.fault, kills = weather, random.Random(SEED + 1)
    runs, deadline, codes = Runs(store.url, tmp_path / "storm", DISK_FAULTS), time.monotonic() + 60 * MINUTES, []
    while 0 not in codes:
        assert runs.starts < 20 + 20 * MINUTES, f"no end in sight: {codes}\n{runs.end_of_log()}"
        process = runs.start()
        try:
            if time.monotonic() < deadline:
                killed(runs, process, kills)
            else:
                process.wait(ALL_STEPS)
        finally:
            kill_all(runs, process)
        codes.append(process.returncode)
    faults = runs.rows("faults.jsonl")
    print(f"{STEPS} steps, {runs.starts} starts that ended with {codes}; {store.failed} of {store.requests} requests")
    print(f"and {len(faults)} operations of the disk failed; steps done: {len(runs.rows('steps-0.jsonl'))}")
    assert store.failed > 0
    assert faults

    done, expected = runs.steps(), calm.steps()
    assert sorted(done) == sorted(expected) == list(range(1, STEPS + 1))
    assert done == expected
    tensors, calm_tensors = runs.tensors(), calm.tensors()
    assert tensors.keys() == calm_tensors.keys()
    assert any(name.startswith("optimizer.") for name in tensors)
    for name in tensors.keys() - {"rng.cpu"}:  # torch's own generator, which each start of the loader draws from
        assert torch.equal(tensors[name], calm_tensors[name]), name
    final = f"checkpoints/step-{STEPS:06d}/state.json"
    state, calm_state = (json.loads((folder / final).read_text()) for folder in (runs.folder, calm.folder))
    assert state["loader"] == calm_state["loader"]
    assert not list(runs.folder.glob("checkpoints/refused-*"))
    assert not list(runs.folder.glob("rejects*"))
