"""How many workers of a Ray cluster are asked for, and what happens if it does not start; with Ray's place taken."""

from __future__ import annotations

import sys
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from stdit_data.errors import DataError
from stdit_data.workers.executors import RayCluster
from stdit_data.workers.work import run_shards


@dataclass
class Add:
    """A task on numbers."""

    gpus: float = 0.0
    has_model: bool = False

    name = "add"

    def open(self) -> int:
        return 1

    def run(self, shard: int, opened: int) -> int:
        return shard + opened


@dataclass
class FakeRay:
    """As much of Ray as is used; what is remote runs at once."""

    machines: list[dict[str, float]]
    late: int = 0  # times that it does not start in time
    started: list[dict[str, Any]] = field(default_factory=list)
    actors: int = 0
    ended: int = 0

    def init(self, **options: Any) -> None:
        self.started.append(options)
        if len(self.started) <= self.late:
            raise Exception("The current node timed out during startup. This could happen")

    def shutdown(self) -> None:
        self.ended += 1

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": resources} for resources in self.machines] + [
            {"Alive": False, "Resources": {"CPU": 100.0, "GPU": 8.0}}
        ]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **needs: Any) -> Any:
        assert needs["num_cpus"] == 1

        def wrap(made: Any) -> Any:
            def create(*arguments: Any) -> Any:
                if not isinstance(made, type):
                    return done(made(*arguments))
                self.actors += 1
                return FakeActor(made(*arguments))

            return SimpleNamespace(remote=create)

        return wrap


class FakeActor:
    def __init__(self, actor: Any) -> None:
        self.run = SimpleNamespace(remote=lambda shard: done(actor.run(shard)))


def done(value: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(value)
    return SimpleNamespace(future=lambda: future)


@pytest.mark.parametrize("has_model", [False, True])
@pytest.mark.parametrize(
    ("machines", "gpus", "wanted", "width"),
    [
        ([{"CPU": 4.0}, {"CPU": 2.0}], 0.0, None, 6),
        ([{"CPU": 4.0}, {"CPU": 2.0}], 0.0, 3, 3),
        ([{"CPU": 2.0}], 0.0, 64, 2),
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0}], 1.0, None, 2),
        ([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}], 0.6, None, 2),  # three do not fit, though 2 / 0.6 > 3
        ([{"CPU": 8.0, "GPU": 2.0}], 0.5, None, 4),
        ([{"CPU": 1.0, "GPU": 8.0}], 1.0, None, 1),
        ([{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 1.0}], 2.0, None, 1),
    ],
)
def test_no_more_workers_than_fit(
    machines: list[dict[str, float]],
    gpus: float,
    wanted: int | None,
    width: int,
    has_model: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay(machines)
    monkeypatch.setitem(sys.modules, "ray", ray)
    cluster, found = RayCluster("auto", wanted), {}
    run_shards(Add(gpus, has_model), enumerate(range(20)), cluster, found.__setitem__, total=20, kept="parts")
    assert found == {number: number + 1 for number in range(20)}
    assert cluster.width == width
    assert (ray.actors, ray.ended) == (width if has_model else 0, 1)


def test_a_cluster_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay([{"CPU": 8.0}])
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(DataError, match=r"^Ray at auto: add needs 1 GPU and a CPU, which none of its machines has$"):
        run_shards(Add(1.0), enumerate(range(3)), RayCluster("auto"), print, total=3, kept="parts")
    assert ray.ended == 1


def test_a_slow_start_here_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(address: str, late: int) -> tuple[FakeRay, dict[int, int]]:
        ray, found = FakeRay([{"CPU": 2.0}], late), {}
        monkeypatch.setitem(sys.modules, "ray", ray)
        run_shards(Add(), enumerate(range(3)), RayCluster(address, 2), found.__setitem__, total=3, kept="parts")
        return ray, found

    ray, found = start("local", 2)
    assert found == {0: 1, 1: 2, 2: 3}
    assert [options["num_cpus"] for options in ray.started] == [2, 2, 2]
    assert ray.ended == 3  # also what was left of those that were late
    for address, late in (("local", 3), ("10.0.0.1:6379", 1)):
        with pytest.raises(DataError, match=rf"^Ray at {address}: The current node timed out"):
            start(address, late)


@pytest.mark.parametrize(("has_model", "gpus", "warned"), [(True, 0.0, True), (True, 1.0, False), (False, 0.0, False)])
def test_gpus_that_a_model_does_not_use_are_told(
    has_model: bool, gpus: float, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay([{"CPU": 2.0, "GPU": 2.0}]))
    run_shards(Add(gpus, has_model), enumerate(range(3)), RayCluster("auto"), print, total=3, kept="parts")
    assert ("add runs on CPUs, though Ray has GPUs; --gpus 1 takes one per worker" in caplog.text) == warned
