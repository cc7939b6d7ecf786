"""benchmarks/gpu: tiny sizes on the CPU, results that are kept, failures that are rows, the largest batch."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    torch.set_num_threads(1)
    return importlib.import_module("benchmarks.gpu.__main__")


def asked(folder: Path, *parts: str, budget: float = 600) -> list[str]:
    return ["--tiny", "--device", "cpu", "--eager", "--out", str(folder), "--budget", str(budget), "--parts", *parts]


def test_every_part_runs_and_is_not_repeated(gpu: ModuleType, tmp_path: Path, capsys, monkeypatch) -> None:
    training = importlib.import_module("benchmarks.gpu.training")
    monkeypatch.setattr(training, "SETTINGS", {"none": False})
    assert gpu.main(asked(tmp_path, *gpu.PARTS)) == 0
    out, err = capsys.readouterr()
    assert "failed" not in err
    assert out.count("\n## ") == len(gpu.PARTS)
    assert "cases are left" not in out
    assert "**no**" not in out  # of the numerics
    entries = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    values = {(entry["part"], entry["case"]): entry["values"] for entry in entries}
    step = values["training", "16x256, eager, checkpointing none"]
    assert step["micro-batch"] == 2
    assert step["samples/s"] == pytest.approx(2 / step["s/step"])
    assert 0 < step["MFU"] < 1
    assert step["estimate GiB"] > 0

    assert gpu.main(asked(tmp_path, *gpu.PARTS, budget=0)) == 0
    again = capsys.readouterr()
    assert again.out == out
    assert not again.err


def test_the_budget_ends_a_call_and_the_next_goes_on(gpu: ModuleType, tmp_path: Path, capsys) -> None:
    assert gpu.main(asked(tmp_path, "peaks", budget=-1)) == 0
    assert "4 cases are left" in capsys.readouterr().out
    assert gpu.main(asked(tmp_path, "peaks")) == 0
    assert "left" not in capsys.readouterr().out


def test_results_of_another_machine_are_not_mixed_in(gpu: ModuleType, tmp_path: Path, capsys) -> None:
    entry = {"part": "peaks", "case": "matmul, bf16", "values": {"TFLOP/s": 987.0}, "about": {"device": "another"}}
    (tmp_path / "results.jsonl").write_text(json.dumps(entry) + '\n{"part": "peaks", "ca')
    assert gpu.main(asked(tmp_path, "peaks", budget=-1)) == 0
    assert "987" not in capsys.readouterr().out


def test_a_failure_is_a_row_and_the_rest_goes_on(gpu: ModuleType, tmp_path: Path, capsys, monkeypatch) -> None:
    setup = importlib.import_module("benchmarks.gpu.setup")
    peaks = importlib.import_module("benchmarks.gpu.peaks")
    calls: list[str] = []

    def fail() -> dict[str, float]:
        calls.append("failing")
        raise ValueError("no such | kernel\nand more")

    def fill() -> dict[str, float]:
        calls.append("large")
        raise torch.OutOfMemoryError("tried to allocate")

    made = [setup.Case("failing", fail), setup.Case("large", fill), setup.Case("good", lambda: {"TFLOP/s": 0.5})]
    monkeypatch.setattr(peaks, "cases", lambda _: made)
    monkeypatch.setattr(gpu, "PARTS", ("none", "peaks"))
    for expected in (["failing", "large"], ["failing"]):  # what has failed is tried again, what does not fit is not
        calls.clear()
        assert gpu.main(asked(tmp_path, "none", "peaks")) == 0
        out = capsys.readouterr().out
        assert "ModuleNotFoundError: No module named 'benchmarks.gpu.none'" in out
        assert "| ValueError: no such / kernel |" in out
        assert "| out of memory |" in out
        assert "| good | " in out
        assert calls == expected


def test_without_a_gpu_one_line_says_so(gpu: ModuleType, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("guess", [1, 5, 12, 300])
def test_the_largest_batch(gpu: ModuleType, guess: int) -> None:
    largest = importlib.import_module("benchmarks.gpu.setup").largest
    for fitting in (*range(20), 33, 100, 255, 256):
        tried: list[int] = []

        def fits(number: int, fitting: int = fitting, tried: list[int] = tried) -> bool:
            assert 1 <= number <= 256
            tried.append(number)
            return number <= fitting

        found = largest(fits, guess, 256)
        assert found == fitting if fitting < 16 else fitting * 8 / 9 - 1 <= found <= fitting
        assert len(tried) == len(set(tried)) <= 20
