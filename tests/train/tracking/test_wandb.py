"""Weights & Biases: what is said without it, and, where it is installed, that a resumed run stays one run."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from stdit_train.build import open_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import ConfigError
from stdit_train.config.schema import TrainConfig
from stdit_train.tracking.metrics import check_wandb


def pretend(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)


def test_it_is_asked_for_by_name(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    check_wandb(None)
    with pytest.raises(ConfigError, match=r"`uv pip install wandb`, or install stdit-cli\[wandb\]"):
        check_wandb("videos")
    config = replace(small, wandb="videos")
    with pytest.raises(ConfigError, match="uv pip install wandb"):
        open_trainer(config, config, RunFolder(tmp_path / "run"), NullCallback()).train()


@pytest.mark.parametrize(("mode", "refused"), [("online", True), ("offline", False)])
def test_who_is_not_signed_in_is_told_how(monkeypatch: pytest.MonkeyPatch, mode: str, refused: bool) -> None:
    class Error(Exception):
        pass

    def login() -> None:
        raise Error("No API key configured.")

    setup = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    pretend(monkeypatch, SimpleNamespace(Error=Error, login=login, setup=lambda: setup))
    if refused:
        with pytest.raises(ConfigError, match=r"No API key configured\. Or set WANDB_MODE=offline"):
            check_wandb("videos")
    else:
        check_wandb("videos")


def test_a_resumed_run_is_one_run(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, which leaves a file for each part: the same id in both, and every step in one of them."""
    pytest.importorskip("wandb", reason="run with `uv run --with wandb pytest`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunFolder(tmp_path / "run")
    for steps in (3, 6):
        config = replace(small, wandb="videos", steps=steps, log_every=1)
        open_trainer(config, config, run, NullCallback()).train()
    first, second = (list(logged(file)) for file in sorted(run.path.glob("wandb/offline-run-*/*.wandb")))
    assert {part[0][:2] for part in (first, second)} == {(run.id, "videos")}
    assert [step for _, step in first[1:]] == [1, 2, 3]
    assert [step for _, step in second[1:]] == [4, 5, 6]


def logged(file: Path) -> Iterator[tuple[str, object]]:
    """(id, project) of a run, then ("", step) of each row; a file of 7 bytes and records as LevelDB logs them."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if 2**15 - at % 2**15 < 7 or not kind:  # the rest of a block is empty
            at += 2**15 - at % 2**15
            continue
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            if record.WhichOneof("record_type") == "run":
                yield record.run.run_id, record.run.project
            elif record.WhichOneof("record_type") == "history":
                yield "", record.history.step.num
