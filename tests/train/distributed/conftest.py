"""Cases that run in a process group of their own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Measure = Callable[..., dict[str, list[dict[str, float]]]]


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Runs cases of a script on a number of processes (see run_cases.py); each process's numbers."""

    def run(processes: int, cases: list[str], script: str = "parallel_cases.py") -> dict[str, list[dict[str, float]]]:
        out = tmp_path_factory.mktemp("cases") / "out.jsonl"
        command = [sys.executable, str(Path(__file__).with_name(script)), str(processes), str(out), *cases]
        done = subprocess.run(command, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr[-4000:]
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        return {row["case"]: row["ranks"] for row in rows}

    return run
