"""What arms cost: measured in turns, whatever else the machine does meanwhile."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stdit_train.ablation import costs
from stdit_train.ablation.arms import Arm
from stdit_train.ablation.costs import ROUNDS, TIMED_STEPS, measure_costs, measured
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.schema import TrainConfig


def test_arms_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down by and by slows all arms alike: the ratio of two stays what it is."""
    clock, load, order = SimpleNamespace(now=0.0), SimpleNamespace(factor=1.0), []
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(costs, "_load_batches", lambda trainer: ([], 0.001))
    monkeypatch.setattr(
        costs, "_measure_parts", lambda *_: dict.fromkeys(("validation", "prompt", "start", "save"), 0.0)
    )

    def trainer(arm: Arm, run: RunFolder) -> Any:
        order.append(arm.name)
        steps = iter([10.0, *[arm.settings["seconds"]] * TIMED_STEPS])  # the first one warms up

        def step(_: list[Any]) -> None:
            clock.now += next(steps) * load.factor
            load.factor *= 1.05

        return SimpleNamespace(train_step=step)

    arms = [Arm("a", {"seconds": 0.2}), Arm("b", {"seconds": 0.1})]
    found = measure_costs(arms, trainer)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(order) == 2 * ROUNDS
    assert found["a"].step / found["b"].step == pytest.approx(2.0, rel=0.1)  # one after the other it would be 1.1
    assert found["a"].clip == 0.001


def test_measuring_trains_nothing(small: TrainConfig, tmp_path: Path) -> None:
    """The learning rate is 0, so that an arm of a wild rate is measured like any other."""
    config = measured(small)
    assert (config.optimizer.lr, config.optimizer.muon_lr) == (0.0, 0.0)
    assert config.optimizer.name == small.optimizer.name
