"""A pool of processes ends with the one that started it, however that ends, and begins no further shard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

# A module of its own, which the workers import.
POOL = """
import sys, time
from pathlib import Path
from stdit_data.workers.executors import Processes
from stdit_data.workers.work import run_shards

class Task:
    name, gpus, has_model = "sleep", 0.0, False

    def open(self):
        pass

    def run(self, shard, opened):
        number, folder, _ = shard
        (Path(folder) / f"{number}.begun").touch()
        time.sleep(120)

if __name__ == "__main__":
    shards = ((number, (number, sys.argv[1], bytes(200_000))) for number in range(20))
    run_shards(Task(), shards, Processes(2), print, total=20, kept="parts")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", ["SIGINT to all", "SIGINT", "SIGTERM", "SIGKILL"])
def test_workers_end_at_once_when_the_process_that_started_them_does(how: str, tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    number = signal.Signals[how.split()[0]]
    started = subprocess.Popen(
        [sys.executable, str(tmp_path / "pool.py"), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.begun"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (os.killpg if how.endswith("all") else os.kill)(started.pid, number)
        out, err = started.communicate(timeout=30)  # until no process is left that could write to these
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    assert sorted(path.name for path in tmp_path.glob("*.begun")) == ["0.begun", "1.begun"]
    assert started.returncode == -number
    assert (out, err.count("Traceback")) == ("", int(number == signal.SIGINT))  # of the first process alone
