"""What an optimizer step sends between processes, and that its results are those of one process."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from stdit_train.config.load import load_stage
from stdit_train.distributed.dims import default_replicas, parallel_dims
from stdit_train.optim.whole_matrices import deal

Measure = Callable[..., dict[str, list[dict[str, float]]]]
LIMIT = 1e-5  # relative


GATHERS, SUMS = "_allgather_base_", "_reduce_scatter_base_"


def test_gradients_are_summed_once_a_step(measure: Measure) -> None:
    """However many micro-batches; weights are gathered for each. What is sent, and held, is what the estimate says."""
    ways = ["fsdp:1:once", "fsdp:4:once", "fsdp:4:each", "dp:4:once"]
    results = measure(2, [f"accumulated:{way}" for way in ways], "step_cases.py")
    one, four, each, copies = (results[f"accumulated:{way}"] for way in ways)
    for numbers in (*one, *four, *each, *copies):
        assert numbers["gradients"] < LIMIT
        assert numbers["as_on_paper"] == 1.0
    for first, late, early in zip(one, four, each, strict=True):
        assert late[GATHERS] == early[GATHERS] == 4 * first[GATHERS] > 0
        assert late[SUMS] == first[SUMS] > 0
        assert early[SUMS] == 4 * first[SUMS]
        assert (late["unreduced"], early["unreduced"]) == (1.0, 0.0)
    for numbers in copies:
        assert numbers["unreduced"] == 1.0
        assert numbers["allreduce_"] == one[0][SUMS]


@pytest.mark.slow
def test_replicas_sum_gradients_once(measure: Measure) -> None:
    """Among the replicas of HSDP once a step either way: it takes no memory."""
    ways = ["hsdp:1:once", "hsdp:2:once", "hsdp:2:each", "hsdp-sp2:2:once"]
    results = measure(4, [f"accumulated:{way}" for way in ways], "step_cases.py")
    for ranks in results.values():
        for numbers in ranks:
            assert numbers["gradients"] < LIMIT
            assert numbers["as_on_paper"] == 1.0
    for first, late, early in zip(*(results[f"accumulated:{way}"] for way in ways[:3]), strict=True):
        assert first["allreduce_"] == late["allreduce_"] == early["allreduce_"] > 0
        assert first[SUMS] == late[SUMS] == early[SUMS] / 2


@pytest.mark.slow
def test_muon_on_shards(measure: Measure) -> None:
    """Two messages for all matrices; weights within rounding; copies of the weights need none."""
    results = measure(2, ["whole_matrices", "muon:fsdp", "muon:dp"], "step_cases.py")
    for numbers in results["whole_matrices"]:
        assert numbers == {"equal": 1.0, "alltoall_base_": 2.0}
    for case, sent in (("muon:fsdp", {"alltoall_base_": 2.0}), ("muon:dp", {})):
        for numbers in results[case]:
            assert numbers.pop("matrices") > 30
            assert numbers.pop("weights") < LIMIT < numbers.pop("moved")
            assert numbers == sent, case


@pytest.mark.slow
def test_muon_on_four_processes(measure: Measure) -> None:
    results = measure(4, ["whole_matrices", "muon:fsdp", "muon:hsdp", "muon:sp2"], "step_cases.py")
    for numbers in results.pop("whole_matrices"):
        assert numbers == {"equal": 1.0, "alltoall_base_": 2.0}
    for ranks in results.values():
        for numbers in ranks:
            assert numbers["weights"] < LIMIT < numbers["moved"]
            assert numbers["alltoall_base_"] == 2.0


def test_every_matrix_has_one_owner_and_the_work_is_even() -> None:
    shapes = ((8, 8),) * 5 + ((8, 32),) * 4 + ((2, 8),)
    owned = deal(shapes, 3)
    assert sorted(i for matrices in owned for i in matrices) == list(range(10))
    costs = [sum(min(shapes[i]) ** 2 * max(shapes[i]) for i in matrices) for matrices in owned]
    assert max(costs) - min(costs) < 8**2 * 32  # less than the largest
    assert deal(shapes[:2], 4) == [[0], [1], [], []]


def test_above_eight_processes_each_node_has_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [default_replicas(*sizes) for sizes in ((8, 8), (8, 4), (16, 8), (64, 4), (12, 8), (16, 1))] == [
        1, 1, 2, 16, 1, 1,
    ]  # fmt: skip
    config = load_stage("16x256")
    assert config.replicate is None
    assert parallel_dims(config, 32).replicate == 4  # of 8 GPUs, unless torchrun says otherwise
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert parallel_dims(config, 32).replicate == 8
    assert parallel_dims(replace(config, replicate=1), 32).replicate == 1
    assert parallel_dims(replace(config, replicate=0), 32).replicate == 32
