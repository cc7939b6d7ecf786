"""What an optimizer step sends between processes, and that its results are those of one process."""

from collections.abc import Callable

import pytest

from stdit_train.optim.whole_matrices import deal

Measure = Callable[..., dict[str, list[dict[str, float]]]]
LIMIT = 1e-5  # relative


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
