"""Whole small runs: what they leave behind, resuming to the bit, micro-batches, interruption."""

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stdit_data.clip import Clip
from stdit_model import STDiTPipeline
from stdit_train.build import build_trainer, open_trainer
from stdit_train.checkpoint.format import load_checkpoint
from stdit_train.checkpoint.run_folder import RunFolder, free_run_folder, newest_run
from stdit_train.checkpoint.verify import CheckpointError, list_checkpoints
from stdit_train.config.load import ConfigError, from_dict, set_values, to_dict
from stdit_train.config.schema import TrainConfig
from stdit_train.tracking.metrics import read_metrics
from stdit_train.trainer import Trainer


class Silent:
    """A watcher that only remembers."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.stop_at: int | None = None

    def started(self, step: int, steps: int) -> None:
        pass

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        if "loss" in values:
            self.losses.append(values["loss"])
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)


class Deleting(Silent):
    """Deletes the run's folder at a step, and passes the rest on."""

    def __init__(self, watcher: Silent, folder: Path, at: int) -> None:
        self.watcher, self.folder, self.at = watcher, folder, at

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        if step == self.at:
            shutil.rmtree(self.folder)
        self.watcher.stepped(step, progress, values)


def start(config: TrainConfig, folder: Path, stop_at: int | None = None) -> tuple[Trainer, Silent]:
    run = RunFolder(folder)
    if not run.config_file.exists():
        run.create(config)
    watcher = Silent()
    watcher.stop_at = stop_at
    return build_trainer(config, run, watcher), watcher


def changed(config: TrainConfig, **values: object) -> TrainConfig:
    return from_dict(set_values(to_dict(config), {key.replace("__", "."): value for key, value in values.items()}))


def test_a_run_leaves_everything_behind(small: TrainConfig, tmp_path: Path) -> None:
    config = replace(small, validate_every=3, sample_every=6)
    trainer, _ = start(config, tmp_path / "run")
    outcome = trainer.train()
    run = RunFolder(tmp_path / "run")
    assert outcome.finished
    assert outcome.step == 6
    assert from_dict(run.read_config()) == config
    rows = read_metrics(run.metrics_file)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    assert run.loss_plot.read_bytes().startswith(b"\x89PNG")
    assert (run.samples / "step-000006.png").exists()
    assert len(list(run.samples.glob("step-000006-*.mp4"))) == 4
    assert list(run.tensorboard.iterdir())
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-000003", "step-000006"]
    pipeline = STDiTPipeline.from_pretrained(run.pipeline)
    for name, value in trainer.ema.model.state_dict().items():
        assert torch.equal(pipeline.transformer.state_dict()[name], value), name


V = {"prediction": "v_prediction", "zero_terminal_snr": True, "min_snr": 5.0, "bound": 0.5}


@pytest.mark.parametrize(
    ("optimizer", "objective"),
    [("muon", {"name": "flow"}), ("adamw", {"name": "iddpm"}), ("muon", {"name": "iddpm", **V})],
)
def test_resuming_is_exact(small: TrainConfig, tmp_path: Path, optimizer: str, objective: dict[str, object]) -> None:
    """Stopped after step 4 (in the second epoch) and resumed: weights and losses as without the stop, to the bit."""
    settings = {f"objective__{key}": value for key, value in objective.items()}
    config = changed(small, optimizer__name=optimizer, **settings, steps=8)
    whole, watched = start(config, tmp_path / "whole")
    whole.train()

    first, first_watched = start(config, tmp_path / "parts", stop_at=4)
    assert not first.train().finished
    second, second_watched = start(config, tmp_path / "parts")
    checkpoint = RunFolder(tmp_path / "parts").latest_checkpoint()
    assert checkpoint is not None
    second.resume(checkpoint)
    assert second.train().finished

    assert first_watched.losses + second_watched.losses == watched.losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    for name, value in whole.ema.model.state_dict().items():
        assert torch.equal(value, second.ema.model.state_dict()[name]), name
    rows = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))


def test_interrupted_while_a_step_is_read(small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first epoch, whose clips are encoded by the step that needs them."""
    whole, watched = start(small, tmp_path / "whole")
    whole.train()

    first, first_watched = start(small, tmp_path / "parts")
    dataset = first.loader.dataset
    load, loaded = dataset.load, []

    def interrupted(index: int, *, seed: int, epoch: int) -> Clip:
        loaded.append(index)
        if len(loaded) == 6:  # of the second step of four
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # a thread ends the waiting for stores
        return load(index, seed=seed, epoch=epoch)

    monkeypatch.setattr(dataset, "load", interrupted)
    outcome = first.train()
    assert (outcome.step, outcome.signal, len(loaded)) == (1, signal.SIGINT, 8)
    second, second_watched = start(small, tmp_path / "parts")
    checkpoint = RunFolder(tmp_path / "parts").latest_checkpoint()
    assert checkpoint is not None
    second.resume(checkpoint)
    assert second.train().finished
    assert first_watched.losses + second_watched.losses == watched.losses


def test_micro_batches_change_nothing(small: TrainConfig, tmp_path: Path) -> None:
    whole, watched = start(changed(small, optimizer__name="adamw"), tmp_path / "whole")
    whole.train()
    parts, parts_watched = start(changed(small, optimizer__name="adamw", micro_batch=1), tmp_path / "parts")
    parts.train()
    assert parts.loader.accumulation == 4
    torch.testing.assert_close(torch.tensor(watched.losses), torch.tensor(parts_watched.losses), rtol=1e-5, atol=0)


def test_remembered_latents_train_like_pixels(small: TrainConfig, tmp_path: Path) -> None:
    slow = changed(small, optimizer__name="adamw", optimizer__lr=1e-6)
    cached_in_memory, watched = start(slow, tmp_path / "remembered")
    cached_in_memory.train()
    pixels, pixels_watched = start(changed(slow, data__cache_latents=False), tmp_path / "pixels")
    pixels.train()
    # not to the bit: the memory holds bfloat16 moments
    torch.testing.assert_close(torch.tensor(watched.losses), torch.tensor(pixels_watched.losses), rtol=1e-2, atol=0)


def test_activation_checkpointing_changes_nothing(small: TrainConfig, tmp_path: Path) -> None:
    plain, watched = start(small, tmp_path / "plain")
    plain.train()
    saved, saved_watched = start(replace(small, activation_checkpointing=True), tmp_path / "saved")
    saved.train()
    assert saved_watched.losses == watched.losses


def test_bf16_autocast_trains(small: TrainConfig, tmp_path: Path) -> None:
    trainer, watcher = start(replace(small, precision="bf16"), tmp_path / "run")
    assert trainer.train().finished
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert len(watcher.losses) == 6


def test_a_time_budget_ends_the_schedule(small: TrainConfig, tmp_path: Path) -> None:
    config = changed(small, steps=10_000, minutes=0.02, optimizer__decay=0.5)
    trainer, _ = start(config, tmp_path / "run")
    outcome = trainer.train()
    assert outcome.finished
    assert outcome.step < 10_000
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr_factor" in row]
    assert rows[-1]["lr_factor"] < rows[0]["lr_factor"]


def test_a_loss_falls(small: TrainConfig, tmp_path: Path) -> None:
    config = changed(small, steps=60, optimizer__decay=0.5, log_every=10, checkpoint_every=100)
    trainer, _ = start(config, tmp_path / "run")
    before = trainer.outputs.validate()["validation_loss"]
    trainer.train()
    assert trainer.outputs.validate()["validation_loss"] < 0.9 * before


def test_a_full_folder_is_refused(small: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        RunFolder(tmp_path).create(small)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_folder_that_is_deleted_costs_no_step(small: TrainConfig, tmp_path: Path) -> None:
    whole, _ = start(small, tmp_path / "whole")
    whole.train()
    trainer, watcher = start(small, tmp_path / "run", stop_at=5)
    trainer.callback = Deleting(watcher, tmp_path / "run", at=4)
    assert not trainer.train().finished
    lines = trainer.run.log_file.read_text().splitlines()
    assert "was deleted; created again without its earlier files" in lines[0]  # the lines before went with it
    resumed = open_trainer(small, small, RunFolder(tmp_path / "run"), Silent())
    assert resumed.step == 5
    assert resumed.train().finished
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_run_folders_are_numbered(tmp_path: Path) -> None:
    assert free_run_folder(tmp_path, "demo") == tmp_path / "demo"
    with pytest.raises(ConfigError, match="nothing to resume"):
        newest_run(tmp_path, "demo")
    (tmp_path / "demo").mkdir()
    assert free_run_folder(tmp_path, "demo") == tmp_path / "demo-2"
    (tmp_path / "demo-2").mkdir()
    assert newest_run(tmp_path, "demo") == tmp_path / "demo-2"


def test_a_checkpoint_of_another_model_is_refused(small: TrainConfig, tmp_path: Path) -> None:
    start(small, tmp_path / "run")[0].train()
    other, _ = start(changed(small, model__depth=1), tmp_path / "other")
    run = RunFolder(tmp_path / "run")
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match="is of another run"):
        other.resume(checkpoint)
    with pytest.raises(ConfigError, match="does not fit this model"):
        load_checkpoint(checkpoint, other.model, other.ema.model, other.optimizers)


def test_patches_that_do_not_divide_are_refused_before_anything_is_written(small: TrainConfig, tmp_path: Path) -> None:
    config = changed(small, model__patch_size=[3, 2, 2])
    with pytest.raises(ConfigError, match=r"patch_size 3x2x2 does not divide .* 4x2x2"):
        open_trainer(config, config, RunFolder(tmp_path / "run"), Silent())
    assert not (tmp_path / "run").exists()
