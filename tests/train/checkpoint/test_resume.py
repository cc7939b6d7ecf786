"""A run that was killed goes on to the bit; a checkpoint that is damaged, or of another run, is refused by name."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit_train.build import open_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint import manager as saving
from stdit_train.checkpoint.format import load_checkpoint, named_tensors
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.checkpoint.verify import CheckpointError, list_checkpoints, verify
from stdit_train.config.load import ConfigError, from_dict, set_values, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.errors import RunEnded
from stdit_train.tracking.metrics import read_metrics
from stdit_train.trainer import Trainer

# Trains argv[1] with the configuration argv[2]; argv[3] names when it kills itself.
SCRIPT = """
    import json, os, signal, sys, torch
    from pathlib import Path
    import stdit_train.checkpoint.format as checkpoint
    from stdit_train.config.load import from_dict
    from stdit_train.checkpoint.run_folder import RunFolder
    from stdit_train.build import open_trainer
    torch.set_num_threads(1)
    class Silent:
        def started(self, *_): pass
        def stepped(self, step, *_):
            if sys.argv[3] == f"step {step}": os.kill(os.getpid(), signal.SIGKILL)
    written = checkpoint.sha256
    def killed_while_sealing(file):
        if "step-000006" in str(file): os.kill(os.getpid(), signal.SIGKILL)
        return written(file)
    if sys.argv[3] == "save": checkpoint.sha256 = killed_while_sealing
    config = from_dict(json.loads(sys.argv[2]))
    open_trainer(config, config, RunFolder(Path(sys.argv[1])), Silent()).train()
"""


def trained(config: TrainConfig, folder: Path) -> tuple[Trainer, list[str]]:
    """A run to its end, from wherever it is."""
    trainer = open_trainer(config, config, RunFolder(folder), NullCallback())
    assert trainer.train().finished
    return trainer, trainer.run.log_file.read_text().splitlines()


def killed(config: TrainConfig, folder: Path, when: str, after: float | None = None) -> None:
    """Trains in another process until SIGKILL; with `after`, that many seconds after its first step."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), json.dumps(to_dict(config)), when]
    process = subprocess.Popen(command)
    if after is not None:
        while not read_metrics(folder / "metrics.jsonl") and process.poll() is None:
            time.sleep(0.01)
        time.sleep(after)
        process.kill()
    process.wait(timeout=280)
    assert after is not None or process.returncode == -signal.SIGKILL


def assert_same(actual: Trainer, expected: Trainer) -> None:
    """Weights, average, optimiser and logged losses, to the bit."""
    tensors = [named_tensors(t.model, t.ema.model, t.optimizers) for t in (actual, expected)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    rows = [read_metrics(trainer.run.metrics_file) for trainer in (actual, expected)]
    losses = [[{k: v for k, v in row.items() if "loss" in k} for row in part if "loss" in row] for part in rows]
    assert losses[0] == losses[1]


@pytest.fixture
def config(small: TrainConfig) -> TrainConfig:
    """Eight steps, saved every third, logged every second (so that a kill falls into an average by timestep)."""
    return replace(small, steps=8, checkpoint_every=3, log_every=2)


@pytest.mark.parametrize("when", ["step 5", "save"])
def test_killed(config: TrainConfig, tmp_path: Path, when: str) -> None:
    killed(config, tmp_path / "run", when)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000003"]
    resumed, lines = trained(config, tmp_path / "run")
    assert any("step-000003" in line for line in lines)
    expected, _ = trained(config, tmp_path / "whole")
    assert_same(resumed, expected)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    "part", [{"lora.rank": 2}, pytest.param({"trained_weights": "temporal"}, marks=pytest.mark.slow)]
)
def test_killed_while_a_part_is_trained(config: TrainConfig, base: Path, tmp_path: Path, part: dict[str, Any]) -> None:
    config = from_dict(set_values(to_dict(config), {"init": str(base), **part}))
    killed(config, tmp_path / "run", "step 5")
    resumed, lines = trained(config, tmp_path / "run")
    assert any("step-000003" in line for line in lines)
    expected, _ = trained(config, tmp_path / "whole")
    assert_same(resumed, expected)


@pytest.mark.slow
@pytest.mark.parametrize("point", range(10))
def test_killed_at_random(small: TrainConfig, tmp_path: Path, point: int) -> None:
    """Before the first checkpoint, between two, or while one is written: every second step is one."""
    config = replace(small, steps=60, checkpoint_every=2, checkpoint_async=bool(point % 2), sample_every=25)
    expected, _ = trained(config, tmp_path / "whole")
    pause = random.Random(point)
    for _ in range(3):
        killed(config, tmp_path / "run", "never", after=pause.uniform(0.0, 1.5))
    resumed, _ = trained(config, tmp_path / "run")
    assert_same(resumed, expected)


def test_killed_before_the_first_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").create(config)
    resumed, lines = trained(config, tmp_path / "run")
    assert any("no checkpoint yet" in line for line in lines)
    assert resumed.step == 8


def tear_tensors(path: Path) -> None:
    file = next((path / "tensors").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_state(path: Path) -> None:
    (path / "state.json").write_text((path / "state.json").read_text()[:100])


def lose_index(path: Path) -> None:
    (path / "tensors" / ".metadata").unlink()


@pytest.fixture(scope="module")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run of six steps with checkpoints at 3 and 6."""
    from stdit_train.config.load import load_stage

    overrides = {
        "steps": 6, "global_batch": 2, "validate_every": 100, "sample_every": 100, "checkpoint_every": 3,
        "model.depth": 1, "model.hidden_size": 16, "data.frames": 2, "data.height": 16, "data.width": 16,
        "data.clips": 4, "data.vae": str(parts), "data.text_encoder": str(parts), "sampling.steps": 1,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("finished") / "run"
    trained(load_stage("demo", overrides), folder)
    return folder


@pytest.mark.parametrize("spoil", [tear_tensors, cut_state, lose_index])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    finished: Path, tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))
    spoil(run.checkpoints / "step-000006")
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.path == run.checkpoints / "step-000003"
    assert len(caplog.messages) == 1
    assert "step-000006 is damaged" in caplog.messages[0]
    config = from_dict(run.read_config())
    trainer, _ = trained(config, run.path)
    assert trainer.step == 6
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.path == run.checkpoints / "step-000006"


def test_a_foreign_checkpoint_is_refused_unread(finished: Path, tmp_path: Path) -> None:
    """Again and again, and it stays where it is: nothing starts from the beginning over it."""
    run = RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))
    run.update_metadata(id="another")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"step-000003 is of another run.*no earlier one is whole"):
            run.latest_checkpoint()
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-000003", "step-000006"]


def test_another_model_is_named(finished: Path) -> None:
    run = RunFolder(finished)
    config = from_dict(set_values(run.read_config(), {"model.depth": 2}))
    with pytest.raises(ConfigError, match=r"step-000006 does not fit this model: ema.blocks.1"):
        open_trainer(config, config, run, NullCallback())
    other = from_dict(set_values(to_dict(config), {"model.depth": 1, "optimizer.name": "adamw"}))
    with pytest.raises(ConfigError, match=r"another optimizer \(Muon and AdamW\)"):
        open_trainer(other, other, run, NullCallback())


def test_those_to_keep_are_kept(config: TrainConfig, tmp_path: Path) -> None:
    trained(replace(config, checkpoint_every=1, keep_checkpoints=2, keep_every=3), tmp_path / "run")
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-000003", "step-000006", "step-000007", "step-000008"]


def test_an_asynchronous_save_holds_its_own_step(config: TrainConfig, tmp_path: Path) -> None:
    expected, _ = trained(replace(config, keep_checkpoints=9), tmp_path / "a")
    trainer, _ = trained(replace(config, keep_checkpoints=9, checkpoint_async=True), tmp_path / "b")
    for step in (3, 6, 8):
        for one in (expected, trainer):
            path = one.run.checkpoints / f"step-{step:06d}"
            load_checkpoint(verify(path, one.run.id), one.model, one.ema.model, one.optimizers)
        tensors = [named_tensors(t.model, t.ema.model, t.optimizers) for t in (trainer, expected)]
        assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """From the second checkpoint on every fsync fails for want of space."""
    real, folder = os.fsync, tmp_path / "run"

    def full(descriptor: int) -> None:
        if list_checkpoints(folder / "checkpoints"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    run, settings = RunFolder(folder), replace(config, checkpoint_async=asynchronous)
    with pytest.raises(RunEnded, match=r"disk is full.*last good checkpoint is .*step-000003.*--resume"):
        open_trainer(settings, settings, run, NullCallback()).train()
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000003"]
    monkeypatch.undo()
    resumed, _ = trained(settings, folder)
    expected, _ = trained(config, tmp_path / "whole")
    assert_same(resumed, expected)


def test_ctrl_c_while_a_checkpoint_is_written(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one, that is, which doesn't wait: it comes out as it went in, and leaves nothing behind."""

    def interrupted(_descriptor: int) -> None:
        if (tmp_path / "run" / "checkpoints").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_trainer(config, config, RunFolder(tmp_path / "run"), NullCallback()).train()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_disk_without_room_is_not_written_to(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "MARGIN", 2**60)
    with pytest.raises(RunEnded, match=r"disk is full \(a checkpoint takes .* MiB are free\); there is no checkpoint"):
        open_trainer(config, config, RunFolder(tmp_path / "run"), NullCallback()).train()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_torchs_writer_does_not_tell_why_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 470")
    fault = saving.told(error, tmp_path)
    assert isinstance(fault, OSError) and not saving.is_full(fault)  # tried again
    monkeypatch.setattr(saving, "SPARE", 2**60)
    assert saving.is_full(saving.told(error, tmp_path))
    assert saving.told(ValueError("x"), tmp_path).args == ("x",)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system of a few MiB needs root")
def test_a_really_full_disk(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("can't mount here")
    try:
        monkeypatch.setattr(saving, "MARGIN", 0)
        settings = replace(config, steps=40, checkpoint_every=1, keep_checkpoints=100)
        with pytest.raises(RunEnded, match=r"disk is full.*last good checkpoint is"):
            open_trainer(settings, settings, RunFolder(disk / "run"), NullCallback()).train()
        last = list_checkpoints(disk / "run" / "checkpoints")[-1]
        newest = RunFolder(disk / "run").latest_checkpoint()
        assert newest is not None
        assert newest.path == last
    finally:
        subprocess.run(["umount", str(disk)], check=True)
