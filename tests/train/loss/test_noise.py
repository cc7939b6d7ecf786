"""Random numbers of samples: no two share any, a batch does not matter, and old runs keep the old ones."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stdit_train.build import open_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.schema import TrainConfig
from stdit_train.curriculum import TrainOptions, find_run
from stdit_train.loss.noise import draw, draw_philox
from stdit_train.tracking.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("few_validated")

SHAPE = (4, 2, 3, 3)
FIELDS = ("posterior", "noise", "level", "drop", "given")
COLLIDING = (24238, 50214)  # samples of epoch 0 and seed 0 whose hashes share their last 32 bits


def test_samples_that_shared_their_numbers_do_not_any_more() -> None:
    old = draw("mt19937", 0, 0, list(COLLIDING), SHAPE)
    assert all(torch.equal(*getattr(old, name)) for name in FIELDS)  # torch's generator takes 32 bits of a seed
    new = draw("philox", 0, 0, list(COLLIDING), SHAPE)
    assert not any(torch.equal(*getattr(new, name)) for name in FIELDS)


def test_seed_epoch_and_index_all_count_in_full() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (2**64, 0, 0), (0, 2**32, 0), (0, 0, 2**32)]
    levels = {float(draw_philox(*key, SHAPE)["level"]) for key in keys}
    assert len(levels) == len(keys)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    together, alone = draw("philox", 7, 3, [5, 9, 11], SHAPE), draw("philox", 7, 3, [9], SHAPE)
    for name in FIELDS:
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name)), name


def test_numbers_are_normal_and_uniform_and_stay_as_they_are() -> None:
    many = draw("philox", 1, 0, list(range(400)), (4, 4, 8, 8))
    for name in ("posterior", "noise"):
        values = getattr(many, name).flatten()
        assert values.dtype == torch.float32
        assert abs(float(values.mean())) < 4 / len(values) ** 0.5
        assert float(values.std()) == pytest.approx(1.0, abs=5e-3)
        assert float((values.abs() > 1.959964).float().mean()) == pytest.approx(0.05, abs=2e-3)
    pairs = torch.stack([many.posterior.flatten(), many.noise.flatten()])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.01
    for uniform in (many.level, many.drop, *many.given.unbind(1)):
        assert 0.0 < float(uniform.min()) < 0.02
        assert 0.98 < float(uniform.max()) < 1.0
    one = draw_philox(1, 2, 3, (1, 1, 1, 2))
    words = np.random.Philox(key=1, counter=[0, 0, 2, 3]).random_raw(6)
    assert float(one["level"]) == (int(words[0] & 0xFFFFFFFF) // 2**9 + 0.5) / 2**23
    radius = [np.sqrt(-2 * np.log((int(word & 0xFFFFFFFF) // 2**8 + 1) / 2**24)) for word in words[4:]]
    angle = [2 * np.pi * (int(word >> 40)) / 2**24 for word in words[4:]]
    assert one["posterior"].flatten().tolist() == pytest.approx(radius * np.cos(angle), abs=1e-6)
    assert one["noise"].flatten().tolist() == pytest.approx(radius * np.sin(angle), abs=1e-6)


def losses(run: RunFolder) -> list[float]:
    return [row["loss"] for row in read_metrics(run.metrics_file) if "loss" in row]


def test_a_run_that_began_before_keeps_its_generator(small: TrainConfig, tmp_path: Path) -> None:
    config = replace(small, draw="mt19937", optimizer=replace(small.optimizer, decay=0.0))
    whole = RunFolder(tmp_path / "whole")
    open_trainer(config, config, whole, NullCallback()).train()
    old, half = RunFolder(tmp_path / "old"), replace(config, steps=3)
    open_trainer(half, half, old, NullCallback()).train()
    saved = json.loads(old.config_file.read_text())
    assert saved.pop("draw") == "mt19937"
    old.config_file.write_text(json.dumps(saved))  # as before 0.2

    (resumed,) = find_run(TrainOptions(resume=str(old.path), overrides={"steps": 6})).configs
    assert resumed.draw == "mt19937"
    open_trainer(resumed, resumed, old, NullCallback()).train()
    assert losses(old) == losses(whole)
    new = RunFolder(tmp_path / "new")
    open_trainer(small, small, new, NullCallback()).train()
    assert json.loads(new.config_file.read_text())["draw"] == "philox"
    assert losses(new)[0] != losses(whole)[0]


def test_resume_auto_keeps_it_too(tmp_path: Path) -> None:
    options = TrainOptions("demo", out=tmp_path / "run", resume="auto")
    (config,) = find_run(options).configs
    assert config.draw == "philox"
    RunFolder(tmp_path / "run").create(replace(config, draw="mt19937"))
    plan = find_run(options)
    assert (plan.resumed, plan.configs[0].draw) == (True, "mt19937")
