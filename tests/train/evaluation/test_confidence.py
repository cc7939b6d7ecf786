"""Intervals against published tables and cases worked by hand; what the ranking says of them."""

import math

import pytest

from stdit_train.ablation.results import LOSS, SEEN, Result, rank, separation
from stdit_train.evaluation.confidence import Interval, mean_interval, paired_difference, t_quantile


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (29, 2.045), (199, 1.972)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=6e-4)


def test_interval_of_a_known_case() -> None:
    found = mean_interval([1.0, 2.0, 3.0])  # deviation 1, standard error 1/sqrt(3)
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert not mean_interval([-1.0, 0.0, 1.5]).separated
    assert mean_interval([1.0, 1.1, 0.9]).separated


def test_a_loss_that_explodes_is_short() -> None:
    assert Interval(1.5, 0.25, 3).text(2) == "1.50 ± 0.25"
    assert Interval(3.62e36, 4e36, 2).text() == "3.62e+36 ± 4e+36"


def test_one_value_has_no_interval() -> None:
    assert mean_interval([5.0]) == Interval(5.0, None, 1)
    assert not mean_interval([5.0]).separated


def test_pairing_takes_out_what_a_seed_has_in_common() -> None:
    first = {0: 1.0, 1: 5.0, 2: 9.0}
    second = {seed: value + 0.1 for seed, value in first.items()} | {7: 100.0}
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(-0.1)
    assert found.separated
    assert found.count == 3


def result(arm: str, seed: int, loss: float, share: float) -> Result:
    shares = {SEEN: {"all": share, "colour": share, "shape": share, "motion": share}}
    return Result(arm, seed, 10, 100, 1.0, 5, 0.1, 1, 0.5, loss, [(10, loss)], shares)


def test_a_ranking_says_what_is_not_separated() -> None:
    noise = [0.0, 0.3, -0.2, 0.1]
    results = [result("a", seed, 1.0 + noise[seed], 0.5) for seed in range(4)]
    results += [result("b", seed, 2.0 + noise[seed] + 0.01 * seed, 0.7 + 0.01 * seed) for seed in range(4)]
    results += [result("c", seed, 2.02 + noise[3 - seed], 0.2) for seed in range(4)]
    by_loss = rank(results, LOSS)
    assert by_loss is not None
    assert by_loss.line in ("a > b ~ c", "a > c ~ b")
    assert by_loss.not_separated == [tuple(by_loss.means)[1:]]
    assert separation(by_loss) in ("Not separated: b and c", "Not separated: c and b")
    by_share = rank(results, SEEN)  # higher is better
    assert by_share is not None
    assert by_share.line == "b > a > c"
    assert separation(by_share) == "All pairs are separated"


def test_only_seeds_that_all_arms_have_are_compared() -> None:
    results = [result("a", 0, 1.0, 0.1), result("b", 0, 2.0, 0.1), result("a", 1, 9.0, 0.1)]
    found = rank(results, LOSS)
    assert found is not None
    assert found.means["a"] == Interval(1.0, None, 1)
    assert found.line == "a ~ b"
    assert separation(found) == "One seed gives no interval, so no pair is separated"
