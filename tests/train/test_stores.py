"""Runs on a store that fails: what passes changes nothing; what does not pass ends the run, saved."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch

from stdit_data.errors import StoreError
from stdit_data.storage import stores
from stdit_data.video.write import write_mp4
from stdit_train.build import open_trainer
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import ConfigError, from_dict, load_stage, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.failures import PeerFailed
from stdit_train.distributed.step_message import StepReport, StepSummary, exchange
from stdit_train.distributed.world import World
from stdit_train.errors import RunEnded
from stdit_train.trainer import Trainer

pytest.importorskip("aiohttp")


class Watcher:
    """Keeps the losses, and calls `then` after a step."""

    def __init__(self, at: int = 0, then: Callable[[], object] = lambda: None) -> None:
        self.losses: dict[int, float] = {}
        self.at, self.then = at, then

    def started(self, step: int, steps: int) -> None: ...

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        self.losses[step] = values["loss"]
        if step == self.at:
            self.then()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(4):
        t = torch.linspace(-1, 1, 20)[None, :, None, None]
        write_mp4(folder / f"{number}.mp4", (t * (number + 1) / 4).expand(3, 20, 32, 32), fps=24)
        (folder / f"{number}.txt").write_text(f"a red circle, {number}")
    return folder


@pytest.fixture
def config(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr(stores, "_patience", stores.PATIENCE)
    data = replace(small.data, cache_latents=False, flip=False, patience=1.0)
    return replace(small, data=data, steps=8, checkpoint_every=100)


def opened(config: TrainConfig, source: object, folder: Path, watcher: Watcher) -> Trainer:
    config = replace(config, data=replace(config.data, source=str(source)))
    return open_trainer(config, config, RunFolder(folder), watcher)


def test_an_outage_ends_the_run_saved_and_it_resumes_to_the_same_losses(
    config: TrainConfig, clips: Path, serve: Callable[[Path], Any], tmp_path: Path
) -> None:
    store, through = serve(clips), Watcher()
    assert opened(config, clips, tmp_path / "whole", through).train().finished

    before = Watcher(at=2, then=lambda: setattr(store, "fault", lambda number, path: 503))
    impatient = replace(config, data=replace(config.data, patience=0.01))
    trainer = opened(impatient, store.url, tmp_path / "run", before)
    with pytest.raises(RunEnded) as caught:
        trainer.train()
    step = trainer.step
    assert 2 <= step < 8
    assert str(caught.value).startswith(f"{store.url}/")
    assert str(caught.value).endswith(
        f"(HTTP 503); try again later. The run is saved at step {step}: resume with stdit train --resume {tmp_path}/run"
    )
    with pytest.raises(StoreError, match="try again later"):  # nothing was trained since
        opened(impatient, store.url, tmp_path / "run", Watcher()).train()

    store.fault = lambda number, path: 503 if number % 10 == 5 else None
    after = Watcher()
    trainer = opened(config, store.url, tmp_path / "run", after)
    assert trainer.step == step
    assert trainer.train().finished
    assert before.losses | after.losses == through.losses
    assert not (tmp_path / "run/rejects.jsonl").exists()


def test_a_signal_ends_the_waiting(
    config: TrainConfig, clips: Path, serve: Callable[[Path], Any], tmp_path: Path
) -> None:
    store = serve(clips)

    def fail() -> None:
        store.fault = lambda number, path: 503
        Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    trainer = opened(config, store.url, tmp_path / "run", Watcher(at=1, then=fail))
    outcome = trainer.train()
    assert outcome.signal == signal.SIGTERM
    assert 1 <= outcome.step < 8
    checkpoint = RunFolder(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.state["step"] == checkpoint.state["loader"]["step"] == outcome.step


def test_a_rank_whose_data_came_saves_the_position_before_them(
    config: TrainConfig, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As told by the message of the second step; the third one's batches are here and are not trained on."""
    trainer = opened(config, clips, tmp_path / "run", Watcher())

    def told(world: World, own: StepReport) -> StepSummary:
        return replace(exchange(world, own), failed=trainer.step == 1)

    monkeypatch.setattr("stdit_train.trainer.exchange", told)
    with pytest.raises(PeerFailed):
        trainer.train()
    assert trainer.loader.position["step"] == 3
    checkpoint = RunFolder(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.state["step"] == checkpoint.state["loader"]["step"] == 2


def test_patience_is_bounded_and_unknown_to_older_runs(small: TrainConfig) -> None:
    saved = to_dict(small)
    del saved["data"]["patience"]
    assert from_dict(saved) == small
    with pytest.raises(ConfigError, match=r"data.patience: .*20"):
        load_stage("demo", {"data.patience": 21})
