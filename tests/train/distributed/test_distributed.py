"""Whole runs on many processes against one: the same samples, losses and weights; resuming, dying, refusing."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stdit_model import STDiT, STDiTPipeline
from stdit_model.weights.folders import LORA_FILE
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import ConfigError, from_dict, load_stage, set_values, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.dims import parallel_dims
from stdit_train.distributed.launch import Ended, launch
from stdit_train.distributed.sharded_weights import init_weights
from stdit_train.distributed.world import World
from stdit_train.tracking.metrics import read_metrics
from stdit_train.tracking.sessions import read_sessions

LIMIT = 1e-5  # relative


@pytest.fixture
def config(small: TrainConfig) -> TrainConfig:
    """AdamW in float32: Muon's matrices are compared by themselves."""
    settings = {
        "optimizer.name": "adamw", "optimizer.lr": 2e-5, "optimizer.decay": 0.0, "objective.name": "iddpm",
        "precision": "fp32", "checkpoint_every": 100, "log_every": 1,
    }  # fmt: skip
    return changed(small, **settings)


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    return from_dict(set_values(to_dict(config), values))


def trained(runs: list[tuple[int, Path, TrainConfig]]) -> list[list[dict[str, Any]]]:
    """Runs to their ends, one after the other, each on a number of processes: what each process reports."""
    script, out = Path(__file__).with_name("many.py"), runs[0][1].with_name("reports.json")
    plan = json.dumps([(processes, str(folder), to_dict(config)) for processes, folder, config in runs])
    command = [sys.executable, str(script), str(out)]
    done = subprocess.run(command, input=plan, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def samples_of(ranks: list[dict[str, Any]], sharing: int = 1) -> dict[int, list[int]]:
    """The samples of each step over all processes, of which `sharing` neighbours have the same."""
    for first in range(0, len(ranks), sharing):
        for other in ranks[first : first + sharing]:
            assert other["samples"] == ranks[first]["samples"]
    steps = ranks[0]["samples"]
    return {int(step): [i for rank in ranks[::sharing] for i in rank["samples"][step]] for step in steps}


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """Losses by step, with those by timestep and of validation."""
    rows: dict[int, dict[str, float]] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        rows.setdefault(int(row["step"]), {}).update({k: v for k, v in row.items() if "loss" in k or "norm" in k})
    return rows


def assert_same_run(found: Path, expected: Path) -> None:
    """Every logged number, and the weights that are left behind."""
    rows, wanted = logged(found), logged(expected)
    assert rows.keys() == wanted.keys()
    for step, row in wanted.items():
        assert row.keys() <= rows[step].keys(), step  # a run that ends between validates there too
        for name, value in row.items():
            assert rows[step][name] == pytest.approx(value, rel=LIMIT), (step, name)
    weights = [STDiT.from_pretrained(folder / "pipeline" / "transformer").state_dict() for folder in (found, expected)]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=0, atol=LIMIT)


def test_from_one_process_to_two_and_back(config: TrainConfig, tmp_path: Path) -> None:
    """Two that share clips and weights, between one alone: samples, losses, validation, the average, videos."""
    config = changed(config, sample_every=3, validate_every=3, checkpoint_async=True, checkpoint_every=2)
    shared = replace(config, sequence=2)
    (expected, *reports) = trained(
        [
            (1, tmp_path / "whole", replace(config, steps=4)),
            (1, tmp_path / "run", replace(shared, steps=1)),
            (2, tmp_path / "run", replace(shared, steps=3)),
            (1, tmp_path / "run", replace(shared, steps=4)),
        ]
    )
    found = {step: samples for ranks in reports for step, samples in samples_of(ranks, len(ranks)).items()}
    assert found == samples_of(expected)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert reports[1][0]["held"] * 2 == pytest.approx(expected[0]["held"], rel=0.02)
    assert reports[1][1]["losses"] == {}  # the callback is called on rank 0
    run, whole = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "whole")
    sessions = read_sessions(run)
    assert [session.get("parallel") for session in sessions] == [
        None, {"world_size": 2, "replicate": 1, "sequence": 2}, None,
    ]  # fmt: skip
    assert run.log_file.read_text().count("resuming from") == 2
    for file in ("step-000003-0.mp4", "step-000003-3.mp4", "step-000003.png"):
        assert (run.samples / file).is_file()
        assert (whole.samples / file).is_file()
    assert STDiTPipeline.from_pretrained(run.pipeline).transformer.config.depth == 2


def test_an_adapter_on_two_processes(config: TrainConfig, base: Path, tmp_path: Path) -> None:
    """Each has all weights; the gradients are averaged once a step, over micro-batches too."""
    part = {"init": str(base), "objective.name": "flow", "lora.rank": 2, "optimizer.lr": 1e-3, "micro_batch": 1}
    config = changed(config, **part, validate_every=2, checkpoint_every=2)
    (expected, *reports) = trained(
        [
            (1, tmp_path / "whole", replace(config, steps=4)),
            (2, tmp_path / "run", replace(config, steps=2)),
            (1, tmp_path / "run", replace(config, steps=3)),
            (2, tmp_path / "run", replace(config, steps=4)),
        ]
    )
    found = {step: samples for ranks in reports for step, samples in samples_of(ranks).items()}
    assert found == samples_of(expected)
    assert [ranks[0]["held"] for ranks in reports] == [expected[0]["held"]] * 3
    rows, wanted = logged(tmp_path / "run"), logged(tmp_path / "whole")
    for step, row in wanted.items():
        for name, value in row.items():
            assert rows[step][name] == pytest.approx(value, rel=LIMIT), (step, name)
    adapters = [load_file(folder / LORA_FILE) for folder in (tmp_path / "run", tmp_path / "whole")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], value, rtol=0, atol=LIMIT)
    assert read_sessions(RunFolder(tmp_path / "run"))[0]["parallel"] == {
        "world_size": 2, "replicate": 2, "sequence": 1,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_any_number_of_processes(config: TrainConfig, tmp_path: Path, optimizer: str) -> None:
    """1 -> 2 (copies) -> 4 (copies of shards, shared clips) -> 1, with micro-batches."""
    config = changed(config, **{"optimizer.name": optimizer, "optimizer.muon_lr": 1e-4, "micro_batch": 1})
    ways: list[tuple[int, dict[str, int]]] = [
        (1, {}), (2, {"replicate": 0}), (4, {"replicate": 2, "sequence": 2}), (1, {"sequence": 2}),
    ]  # fmt: skip
    parts = [
        (processes, tmp_path / "run", replace(config, steps=2 * number, **how))
        for number, (processes, how) in enumerate(ways, start=1)
    ]
    (expected, *reports) = trained([(1, tmp_path / "whole", replace(config, steps=8)), *parts])
    found: dict[int, list[int]] = {}
    for ranks, (processes, how) in zip(reports, ways, strict=True):
        found |= samples_of(ranks, how.get("sequence", 1) if processes > 1 else 1)
    assert found == samples_of(expected)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


FAILING = """
    from stdit_train.distributed.world import World

    with World.from_env() as world:
        if world.rank == 1:
            raise ZeroDivisionError("in the second")
        world.on_all(lambda: None)
"""


@pytest.mark.slow
def test_a_process_that_fails_shows_its_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "failing.py").write_text(textwrap.dedent(FAILING))
    assert launch(2, [sys.executable, str(tmp_path / "failing.py")]) == Ended(1)
    err = capfd.readouterr().err
    assert "ZeroDivisionError: in the second" in err
    assert err.count("Traceback") == 1 or "Connection closed by peer" in err  # the other one waits for it


def test_world_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun sets it; one process without it."""
    assert (World.from_env().rank, World.from_env().size) == (0, 1)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    world = World.from_env()
    assert (world.rank, world.size, world.local_rank, world.is_main) == (3, 4, 1, False)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match="RANK=4, WORLD_SIZE=4, LOCAL_RANK=1: expected numbers"):
        World.from_env()


def test_initial_weights_are_those_of_one_process() -> None:
    arguments = {"variant": "seq", "depth": 2, "hidden_size": 32, "num_heads": 4, "caption_channels": 8}
    torch.manual_seed(3)
    expected = STDiT(**arguments).state_dict()
    found = dict(init_weights(arguments, 3))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_does_not_fit_is_refused(small: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="global batch of 4 is not a multiple of the 3 data-parallel ranks"):
        parallel_dims(small, 3)
    with pytest.raises(ConfigError, match="replicate is 2, which does not divide 3 processes"):
        parallel_dims(replace(small, replicate=2), 3)
    with pytest.raises(ConfigError, match="8 processes per clip, but it has 4 frames"):
        parallel_dims(replace(small, sequence=8), 8)
    with pytest.raises(ConfigError, match="precision=fp16 is for one process"):
        parallel_dims(replace(small, precision="fp16"), 2)
    assert parallel_dims(replace(small, replicate=0), 4).shard == 1
    assert parallel_dims(replace(small, sequence=2, replicate=3), 1).world_size == 1  # of no matter to one
    published = parallel_dims(load_stage("360x512", {}), 8)  # two to a clip
    assert (published.sequence, published.data, published.shard) == (2, 4, 8)
    with pytest.raises(ConfigError, match="sequence: input should be greater than or equal to 1, not 0"):
        load_stage("demo", {"sequence": 0})
