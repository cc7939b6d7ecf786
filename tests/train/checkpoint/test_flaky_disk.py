"""A disk that fails for a moment costs no checkpoint, and an error out of the loop no step."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit_data.errors import StoreError
from stdit_data.storage import stores
from stdit_train.build import open_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint import manager
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.checkpoint.verify import CheckpointError, list_checkpoints, verify
from stdit_train.config.schema import TrainConfig
from stdit_train.curriculum import TrainOptions, find_run
from stdit_train.errors import CheckpointFailed, ConfigError, RunEnded
from stdit_train.trainer import Trainer


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "PAUSES", (0.0, 0.0))


def opened(config: TrainConfig, folder: Path) -> Trainer:
    return open_trainer(config, config, RunFolder(folder), NullCallback())


def steps_of(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")]


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Sealing a checkpoint fails so many times; returns what was sealed or tried."""
    real, tried = manager.finish_write, list[str]()

    def finish(partial: Path, final: Path, state: Any) -> None:
        tried.append(final.name)
        if len(tried) <= times:
            raise OSError(5, "Input/output error")
        real(partial, final, state)

    monkeypatch.setattr(manager, "finish_write", finish)
    return tried


def test_a_passing_fault_is_met_by_trying_again(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = failing(monkeypatch, 2)
    assert opened(replace(small, checkpoint_async=False), tmp_path / "run").train().finished
    assert tried == ["step-000003"] * 3 + ["step-000006"]
    assert steps_of(tmp_path / "run") == [3, 6]
    assert "step 3: the checkpoint could not be written" in caplog.text


def test_one_lost_in_the_background_is_made_up_for_at_the_next_step(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the next checkpoint, a thousand steps later; and in the foreground."""
    tried = failing(monkeypatch, 1)
    trainer = opened(replace(small, checkpoint_async=True, checkpoint_every=3, steps=8), tmp_path / "run")
    step = trainer.train_step

    def slower_than_the_write(batches: Any) -> Any:
        if trainer.checkpoints._pending is not None:
            trainer.checkpoints._pending.exception()
        return step(batches)

    monkeypatch.setattr(trainer, "train_step", slower_than_the_write)
    saves: list[tuple[int, bool]] = []
    save = trainer.checkpoints.save

    def recorded(step: int, *arguments: Any, last: bool = False) -> None:
        saves.append((step, last))
        save(step, *arguments, last=last)

    monkeypatch.setattr(trainer.checkpoints, "save", recorded)
    assert trainer.train().finished
    assert saves == [(3, False), (4, True), (6, False), (8, True)]
    assert tried == ["step-000003", "step-000004", "step-000006", "step-000008"]
    log = trainer.run.log_file.read_text()
    assert "a checkpoint could not be written in the background (Input/output error); saving again" in log


def test_a_lasting_fault_ends_the_run_in_one_line(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing(monkeypatch, 1000)
    with pytest.raises(CheckpointFailed, match=r"cannot write a checkpoint .*Input/output error.*no checkpoint yet"):
        opened(replace(small, checkpoint_async=False), tmp_path / "run").train()
    assert tried == ["step-000003"] * 3
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("where", ["loss", "callback"])
def test_an_error_saves_what_there_is_and_resuming_is_exact(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config = replace(small, checkpoint_every=100, log_every=2)
    whole = opened(config, tmp_path / "whole")
    whole.train()
    trainer = opened(config, tmp_path / "run")
    done = 5 if where == "callback" else 4  # steps before the error

    def fail_after(real: Any) -> Any:
        def act(*arguments: Any) -> Any:
            if trainer.step == done:
                raise ZeroDivisionError(where)
            return real(*arguments)

        return act

    if where == "loss":
        monkeypatch.setattr(trainer.batch_loss, "loss", fail_after(trainer.batch_loss.loss))
    else:
        monkeypatch.setattr(trainer.callback, "stepped", fail_after(trainer.callback.stepped))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert steps_of(tmp_path / "run") == [done]
    assert f"an error ends the run after step {done}, which is saved" in trainer.run.log_file.read_text()
    monkeypatch.undo()
    resumed = opened(config, tmp_path / "run")
    assert resumed.step == done
    resumed.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_weights_that_are_changing_are_not_saved(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = opened(replace(small, checkpoint_every=2), tmp_path / "run")
    update = trainer.ema.update

    def fail(model: Any) -> None:
        if trainer.step == 3:
            raise RuntimeError("out of memory")
        update(model)

    monkeypatch.setattr(trainer.ema, "update", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert steps_of(tmp_path / "run") == [2]


def test_no_partial_folder_is_left(small: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / ".step-000001.partial"
    trainer = opened(small, tmp_path / "run")
    folder.mkdir(parents=True)
    trainer.train()
    assert not list(folder.parent.glob(".*"))


def test_the_files_of_all_processes_are_required(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines that do not share the folder: rank 0 has its own shard alone. By the index, which names all."""
    trainer = opened(replace(small, checkpoint_async=False), tmp_path / "run")
    write = manager.write_tensors

    def write_half(partial: Path, *arguments: Any, **options: Any) -> None:
        write(partial, *arguments, **options)
        (partial / "tensors" / "__0_0.distcp").unlink()
        (partial / "tensors" / "stray").touch()

    monkeypatch.setattr(manager, "write_tensors", write_half)
    with pytest.raises(CheckpointFailed, match=r"tensors/__0_0.distcp, which another process wrote, is not there"):
        trainer.train()
    monkeypatch.undo()
    trainer = opened(small, tmp_path / "run")
    trainer.train()
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    assert sorted(state["files"]) == ["tensors/.metadata", "tensors/__0_0.distcp"]
    del state["files"]["tensors/__0_0.distcp"]  # as before 0.2
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"lacks tensors/__0_0.distcp: another process wrote it"):
        verify(checkpoint, trainer.run.id)


def test_a_disk_that_cannot_be_read_now_damages_nothing(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(small, tmp_path / "run").train()
    text = Path.read_text

    def fail(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == "state.json":
            raise OSError(5, "Input/output error")
        return text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr(stores, "_patience", 0.1 / 60)
    with pytest.raises(RunEnded, match=r"cannot read .*step-000006 \(Input/output error\): check the disk"):
        RunFolder(tmp_path / "run").latest_checkpoint()
    assert steps_of(tmp_path / "run") == [3, 6]


@pytest.mark.parametrize("name", ["config.json", "run.json", "state.json"])
def test_a_run_is_found_although_the_disk_fails_for_a_moment(
    name: str, small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(small, tmp_path / "run").train()
    expected = find_run(TrainOptions(resume=str(tmp_path / "run")))
    text, failed = Path.read_text, list[Path]()

    def fail(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == name and len(failed) < 2:
            failed.append(path)
            raise OSError(116, "Stale file handle")
        return text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", fail)
    found = find_run(TrainOptions(resume=str(tmp_path / "run")))
    checkpoint = found.runs[0].latest_checkpoint()
    assert len(failed) == 2
    assert found.configs == expected.configs
    assert checkpoint is not None and checkpoint.path.name == "step-000006"


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [(5, StoreError, "config.json: the disk failed for"), (13, ConfigError, "config.json cannot be read")],
)
def test_a_disk_that_goes_on_failing_is_told(
    code: int, kind: type, words: str, small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder(tmp_path / "run").create(small)

    def fail(path: Path, *arguments: Any, **options: Any) -> str:
        raise OSError(code, "no")

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr(stores, "_patience", 0.1 / 60)
    with pytest.raises(kind, match=words):
        find_run(TrainOptions(resume=str(tmp_path / "run")))
