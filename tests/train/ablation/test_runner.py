"""The runs of an ablation, one after another."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from stdit_train.ablation import runner
from stdit_train.ablation.arms import Arm, Study, make_arms
from stdit_train.ablation.runner import Ablation
from stdit_train.callbacks import NullCallback
from stdit_train.config.schema import TrainConfig
from stdit_train.trainer import Trainer


def test_a_signal_while_a_result_is_written_ends_the_ablation(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "measure_costs", lambda arms, open_trainer: {})
    arms = make_arms(small, ["seq"], [("optimizer.lr", [1e-4, 2e-4])])
    study = Study(base=small, arms=arms, seeds=1, match="steps", steps=2, minutes=None, prompts=0, given={})
    begun: list[str] = []

    def watch(arm: Arm, seed: int) -> NullCallback:
        begun.append(arm.name)
        return NullCallback()

    with monkeypatch.context() as patch:
        finish: Any = Trainer.finish
        patch.setattr(Trainer, "finish", lambda self: (os.kill(os.getpid(), signal.SIGTERM), finish(self)))
        assert not Ablation(study, tmp_path / "ablation").run(watch)
    assert begun == [arms[0].name]
    assert Ablation(study, tmp_path / "ablation").run(watch)
    assert begun == [arm.name for arm in arms]
