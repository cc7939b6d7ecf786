"""What a step waits for and sends: the device once and one message, however many micro-batches it has."""

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from stdit_train.build import build_trainer
from stdit_train.callbacks import NullCallback
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.schema import TrainConfig
from stdit_train.distributed.step_message import StepReport, exchange
from stdit_train.distributed.world import World
from stdit_train.trainer import Trainer

MESSAGES = (
    "broadcast_from_main", "on_all", "all_max", "gather_numbers", "all_gather", "collect", "all_arrive", "first_result",
    "gather",
)  # fmt: skip
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Messages of a process, and reads of tensors, as they are made."""
    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    for name in MESSAGES:
        counted(World, name)
    for name in READS:
        counted(Tensor, name)
    return counts


def start(config: TrainConfig, folder: Path, callback: Any = None) -> Trainer:
    run = RunFolder(folder)
    run.create(config)
    return build_trainer(config, run, callback or NullCallback())


def test_every_message_of_a_process_is_counted() -> None:
    own = {name for name, value in vars(World).items() if callable(value) and not name.startswith("_")}
    assert own == {*MESSAGES, "from_env", "connect", "with_mesh", "device", "select_gpu"}


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_a_step_reads_the_device_once(
    small: TrainConfig, tmp_path: Path, count: Counter[str], micro_batch: int
) -> None:
    trainer = start(replace(small, micro_batch=micro_batch), tmp_path / "run")
    batches = next(iter(trainer.loader))
    assert len(batches) == 4 // micro_batch
    trainer.train_step(batches)  # encodes the captions
    count.clear()
    trainer.train_step(batches)
    # the second is the timesteps, which are drawn on the CPU
    assert {name: n for name, n in count.items() if n} == {"tolist": 2, "gather_numbers": 1}


def test_the_loop_adds_no_message(small: TrainConfig, tmp_path: Path, count: Counter[str]) -> None:
    seen: list[int] = []
    looked: list[bool] = []

    class Watch(NullCallback):
        def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
            seen.append(sum(count[name] for name in MESSAGES))

    trainer = start(replace(small, log_every=4, checkpoint_every=100), tmp_path / "run", Watch())
    restore: Callable[[], None] = trainer._restore_folder
    trainer._restore_folder = lambda: (looked.append(True), restore())[1]  # type: ignore[method-assign]
    trainer.train()
    assert [after - before for before, after in pairwise(seen)] == [1] * 5
    assert len(looked) == 2  # after the fourth step, and after the last


def test_a_summary_takes_one_of_each_group_that_shares_clips() -> None:
    """Four processes, two to a clip: means over all, samples of each group once, the largest of the rest."""

    class Four(World):
        size, dp_size = 4, 2

        def gather_numbers(self, numbers: list[float]) -> list[list[float]]:
            rows = [[float(number) for number in numbers] for _ in range(4)]
            for rank, row in enumerate(rows):
                row[0] = 1.0 if rank >= 2 else 0.0  # repeats
                row[2] = 0.25 * rank  # waited
                row[7] = float(rank // 2)  # the loss
                row[-2:] = [10.0 * (rank // 2), 20.0]
            rows[3][1], rows[1][4], rows[2][6] = 9.0, 15.0, 1.0
            return rows

    own = StepReport({"loss": 0.0}, [500.0, 600.0], [0.0, 0.0], seconds=2.0, memory=7)
    told = exchange(Four(), own)
    assert (told.terms, told.repeats, told.seconds, told.memory) == ({"loss": 0.5}, 1, 9.0, 7.0)
    assert (told.waits, told.signal, told.lost, told.failed) == ([0.0, 0.25, 0.5, 0.75], 15, False, True)
    assert (told.timesteps, told.losses) == ([500.0, 600.0, 500.0, 600.0], [0.0, 20.0, 10.0, 20.0])


def test_garbage_is_collected_at_fixed_steps_alone(
    small: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stdit_train.garbage.EVERY", 2)
    states: list[tuple[bool, bool]] = []

    class Watch(NullCallback):
        def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
            states.append((gc.isenabled(), gc.get_freeze_count() > 0))

    trainer = start(small, tmp_path / "run", Watch())
    collected: list[int] = []
    gc.callbacks.append(lambda phase, about: collected.append(trainer.step) if phase == "start" else None)
    try:
        trainer.train()
    finally:
        gc.callbacks.pop()
    assert states == [(False, True)] * 6
    assert {2, 4, 6} <= set(collected)
    assert not {1, 3, 5} & set(collected)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
