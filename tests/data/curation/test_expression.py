"""Conditions: what they hold for, what they refuse, and their quantiles."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stdit_data.curation.filtering.expression import Condition, Rule, find_quantiles
from stdit_data.errors import DataError

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
TABLE = pa.table(
    {
        "motion": pa.array([0.0, 1.0, 2.0, None, 4.0]),
        "fps": pa.array([24, 25, None, 30, 60]),
        "codec": pa.array(["h264", "vp9", None, "h264", ""]),
        "still": pa.array([True, False, False, None, False]),
    }
)
numbers = st.integers(-3, 5)
leaves = st.tuples(st.sampled_from(["motion", "fps"]), st.sampled_from(list(COMPARE)), numbers)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(st.tuples(st.just("not"), inner), st.tuples(st.sampled_from(["and", "or"]), inner, inner)),
    max_leaves=6,
)


def written(tree: Any) -> str:
    if tree[0] == "not":
        return f"not ({written(tree[1])})"
    if tree[0] in ("and", "or"):
        return f"({written(tree[1])}) {tree[0]} ({written(tree[2])})"
    return f"{tree[0]} {tree[1]} {tree[2]}"


def expected(tree: Any, row: dict[str, Any]) -> bool:
    if tree[0] == "not":
        return not expected(tree[1], row)
    if tree[0] == "and":
        return expected(tree[1], row) and expected(tree[2], row)
    if tree[0] == "or":
        return expected(tree[1], row) or expected(tree[2], row)
    value = row[tree[0]]
    return value is not None and COMPARE[tree[1]](value, tree[2])


def kept(text: str, table: pa.Table = TABLE) -> list[bool]:
    return np.logical_and.reduce(Condition(text).masks(table)).tolist()


@settings(deadline=None)
@given(trees)
def test_any_condition_holds_where_python_says_so(tree: Any) -> None:
    """Over rows with missing values, before and after it is written out as rules."""
    right = [expected(tree, row) for row in TABLE.to_pylist()]
    condition = Condition(written(tree))
    assert kept(condition.text) == right
    assert kept(condition.resolved({}).text) == right
    assert kept(" and ".join(f"({rule.text})" for rule in condition.rules)) == right


@settings(deadline=None)
@given(st.text(st.sampled_from("motionfps q10<>=!+-*/()'\"[]{}.,:;&|~\\\n\0 ")), st.sampled_from(["", " > 1"]))
@example("-" * 900 + "motion", " > 1")
@example("-" * 9000 + "motion", " > 1")
@example("(" * 900 + "motion", " > 1")
@example("motion > 1" + " and motion > 1" * 90, "")
@example("9" * 400, " > motion")
@example("9" * 5000, " > motion")
@example("__import__('os').system('true')", "")
@example("motion.__class__", " > 1")
@example("(motion := 1)", " > 1")
@example("[motion for motion in fps]", " > 1")
def test_any_text_is_a_condition_or_one_line(text: str, end: str) -> None:
    try:
        condition = Condition(text + end)
        condition.check_columns(TABLE.column_names)
        limits = find_quantiles(condition, lambda: [TABLE])
        assert all(len(mask) == len(TABLE) for mask in condition.resolved(limits).masks(TABLE))
        assert len(condition.rules) == len(condition.parts)
    except DataError as error:
        assert "Traceback" not in str(error)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("motion is None", [3]),
        ("motion is not None and fps is not None", [0, 1, 4]),
        ("not motion > 1", [0, 1, 3]),  # a comparison with a missing value does not hold
        ("codec == 'h264'", [0, 3]),
        ("codec != 'h264'", [1, 4]),
        ("codec is None", [2]),
        ("still == 1", [0]),
        ("0 < motion < 4", [1, 2]),
        ("motion / fps > 0.05", [4]),
        ("1 / motion > 10", [0]),  # infinite
        ("-motion < -1", [2, 4]),
        ("fps - 2 * 12 == 0", [0]),
    ],
)
def test_what_conditions_hold_for(text: str, rows: list[int]) -> None:
    assert np.flatnonzero(kept(text)).tolist() == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "invalid syntax; expected for example 'motion > 0.3 and fps >= 24'"),
        ("motion", "'motion' is not allowed; expected comparisons of columns"),
        ("motion = 3", "expected for example"),
        ("motion in (1, 2)", "'motion in (1, 2)' is not allowed"),
        ("len(codec) > 3", "'len(codec)' is not allowed"),
        ("motion ** 2 > 3", "'motion ** 2' is not allowed"),
        ("motion > True", "'True' is not allowed"),
        ("motion > 1j", "'1j' is not allowed"),
        ("motion + 1 is None", "is not allowed"),
        ("q10 > 0.5", "q10 is compared with no column"),
        ("motion > q10 + 1", "a quantile stands alone on its side of a comparison"),
        ("motion > " + "9" * 400, "a number of 400 digits is too large"),
    ],
)
def test_what_is_no_condition(text: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        Condition(text)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"condition {text!r}: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("motoin > 1", r"unknown column 'motoin' in 'motoin > 1'; did you mean 'motion'\? columns: motion, fps, codec"),
        ("fps > 1 and Codec == 'x'", r"unknown column 'Codec' .*; did you mean 'codec'\?"),
        ("zzz > 1", r"unknown column 'zzz' in 'zzz > 1'; columns: motion"),
        ("zzz > q10", r"unknown column 'zzz'"),
    ],
)
def test_an_unknown_column_names_the_nearest(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Condition(text).check_columns(TABLE.column_names)


@pytest.mark.parametrize("text", ["codec > 'a'", "codec == 1", "motion == 'fast'", "codec + 1 > 2", "-codec > 1"])
def test_text_is_compared_with_text_alone(text: str) -> None:
    with pytest.raises(DataError, match="text"):
        kept(text)


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    st.integers(0, 100),
    st.sampled_from(["<", "<=", ">", ">="]),
)
def test_quantiles_are_those_of_all_rows(values: list[float], percent: int, sign: str) -> None:
    """Over several shards, without missing values."""
    tables = [pa.table({"x": pa.array([value, None], pa.float64())}) for value in values]
    condition = Condition(f"x {sign} q{percent}")
    limits = find_quantiles(condition, lambda: tables)
    limit = float(np.quantile(values, percent / 100))
    assert limits == {("x", percent / 100): limit}
    (rule,) = condition.resolved(limits).rules
    assert (rule.column, rule.limit) == ("x", limit)
    together = pa.table({"x": pa.array(values, pa.float64())})
    assert kept(condition.resolved(limits).text, together) == [COMPARE[sign](value, limit) for value in values]


def test_quantiles_of_both_sides_of_arithmetic_and_of_none() -> None:
    limits = find_quantiles(Condition("q0 < motion <= q99_5 or fps / motion > q50"), lambda: [TABLE])
    assert set(limits) == {("motion", 0.0), ("motion", 0.995), ("fps / motion", 0.5)}
    assert limits["fps / motion", 0.5] == 20.0  # of 25 and 15: one row is divided by zero
    assert all(math.isfinite(limit) for limit in limits.values())
    empty = pa.table({"motion": pa.array([None, None], pa.float64())})
    with pytest.raises(DataError, match="motion: no row has a value to take a quantile of"):
        find_quantiles(Condition("motion > q10"), lambda: [empty])


def test_rules_have_a_column_and_a_limit_where_there_is_one() -> None:
    condition = Condition(
        "motion > 0.3 and 24 <= fps and (still is None or still <= 0.5) and motion < fps and -2 < motion"
    )
    assert condition.rules == [
        Rule("motion > 0.3", "motion", 0.3),
        Rule("24 <= fps", "fps", 24.0),
        Rule("still is None or still <= 0.5", "still", 0.5),
        Rule("motion < fps", None, None),
        Rule("-2 < motion", "motion", -2.0),
    ]
    assert condition.columns == ["motion", "fps", "still"]
