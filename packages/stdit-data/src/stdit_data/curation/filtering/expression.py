"""Conditions over a manifest's columns, such as `motion > 0.3 and text_area < 0.02`, parsed and never executed.

    condition   = condition "and" condition | condition "or" condition | "not" condition | comparison
    comparison  = value (< | <= | > | >= | == | !=) value ... | column "is None" | column "is not None"
    value       = column | number | "text" | q0 to q100 | value (+ | - | * | /) value | -value

`q10` is the 10 % quantile of what it is compared with. A comparison with a missing value does not hold.
"""

from __future__ import annotations

import ast
import difflib
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from stdit_data.errors import DataError

Values = np.ndarray[Any, Any]
_QUANTILE = re.compile(r"q(\d{1,2}(?:_\d+)?|100)$")  # q0_5 is 0.5 %
_COMPARE: dict[type, tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Rule:
    """One of the conditions joined by `and`, which a row must fulfil.

    Attributes:
        text: the condition, without quantiles once they are resolved.
        column, limit: of a comparison of a column with a number, alone or after "is None or"; else None.
    """

    text: str
    column: str | None = None
    limit: float | None = None


class Condition:
    """A parsed expression.

    Raises:
        DataError: it is none, with what is wrong.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            tree = ast.parse(text.strip(), mode="eval")
            ast.unparse(tree)  # goes deeper than all else that is done with it
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = getattr(error, "msg", None) or str(error) or "too deeply nested"
            raise DataError(
                f"condition {text!r}: {reason}; expected for example 'motion > 0.3 and fps >= 24'"
            ) from None
        self.parts = list(_conjuncts(tree.body))
        for part in self.parts:
            _check(part, text)

    @property
    def columns(self) -> list[str]:
        """Return the names of the columns that the condition needs, in order."""
        names = (node.id for part in self.parts for node in ast.walk(part) if isinstance(node, ast.Name))
        return list(dict.fromkeys(name for name in names if not _QUANTILE.match(name)))

    def check_columns(self, known: Sequence[str]) -> None:
        """
        Raises:
            DataError: a column that there is none of; names the nearest.
        """
        for name in self.columns:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise DataError(f"unknown column {name!r} in {self.text!r}; {hint}columns: {', '.join(known)}")

    @property
    def quantiles(self) -> list[tuple[str, float]]:
        """Return (value, share) of each quantile: the text of the expression that it is taken of, and 0 to 1."""
        return [(ast.unparse(of), share) for part in self.parts for _, of, share in _quantiles(part, self.text)]

    def resolved(self, limits: Mapping[tuple[str, float], float]) -> Condition:
        """Return the condition with numbers in place of quantiles."""

        class Replace(ast.NodeTransformer):
            def __init__(self, found: Mapping[int, float]) -> None:
                self.found = found

            def visit_Name(self, node: ast.Name) -> ast.AST:
                return ast.Constant(self.found[id(node)]) if id(node) in self.found else node

        texts = []
        for part in self.parts:
            found = {id(node): limits[ast.unparse(of), share] for node, of, share in _quantiles(part, self.text)}
            text = ast.unparse(Replace(found).visit(part))
            texts.append(f"({text})" if isinstance(part, ast.BoolOp) else text)
        return Condition(" and ".join(texts))

    @property
    def rules(self) -> list[Rule]:
        """Return the conditions that `and` joins."""
        return [_rule(part) for part in self.parts]

    def masks(self, table: pa.Table) -> list[Values]:
        """Return for each rule which rows fulfil it."""
        columns = {name: column_values(table, name) for name in self.columns}
        return [np.broadcast_to(_truth(part, columns), len(table)) for part in self.parts]

    def values(self, text: str, table: pa.Table) -> Values:
        """Return the values of an arithmetic part, such as the argument of a quantile; NaN where one is missing."""
        part = ast.parse(text, mode="eval").body
        names = {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}
        return np.asarray(_value(part, {name: column_values(table, name) for name in names}), dtype=np.float64)


def column_values(table: pa.Table, name: str) -> Values:
    """Return a column as float64 with NaN for missing values, or as objects if it is text."""
    column = table.column(name)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
        return np.asarray(column.cast(pa.float64()).to_numpy())
    if pa.types.is_null(column.type):
        return np.full(len(table), np.nan)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"column {name!r} is of type {column.type}; conditions compare numbers and text")
    return np.array(column.to_pylist(), dtype=object)


def _conjuncts(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        for value in node.values:
            yield from _conjuncts(value)
    elif isinstance(node, ast.Compare) and len(node.ops) > 1:
        sides = [node.left, *node.comparators]
        for left, op, right in zip(sides, node.ops, sides[1:], strict=False):
            yield ast.Compare(left, [op], [right])
    else:
        yield node


def _check(node: ast.expr, text: str) -> None:
    """Refuse everything that is not in the grammar."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(value, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand, text)
    elif isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        if any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            plain = len(node.ops) == 1 and isinstance(node.left, ast.Name)
            if not plain or not (isinstance(sides[1], ast.Constant) and sides[1].value is None):
                raise _refused(node, text)
            return
        for op in node.ops:
            if type(op) not in _COMPARE:
                raise _refused(node, text)
        for side in sides:
            _check_value(side, text)
        list(_quantiles(node, text))
    else:
        raise _refused(node, text)


def _check_value(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        _check_value(node.left, text)
        _check_value(node.right, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _check_value(node.operand, text)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool) or not isinstance(node.value, int | float | str):
            raise _refused(node, text)
        if isinstance(node.value, int) and node.value.bit_length() > 1023:
            raise DataError(f"condition {text!r}: a number of {len(str(node.value))} digits is too large")
    elif not isinstance(node, ast.Name):
        raise _refused(node, text)


def _refused(node: ast.expr, text: str) -> DataError:
    return DataError(
        f"condition {text!r}: {ast.unparse(node)!r} is not allowed; expected comparisons of columns, numbers and "
        "quantiles (q10), joined by and, or, not"
    )


def _quantiles(node: ast.expr, text: str) -> Iterator[tuple[ast.Name, ast.expr, float]]:
    """Return (the quantile, its argument, share) of the comparisons in an expression."""
    if not isinstance(node, ast.Compare):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from _quantiles(child, text)
        return
    sides = [node.left, *node.comparators]
    for i, side in enumerate(sides):
        if isinstance(side, ast.Name) and (match := _QUANTILE.match(side.id)):
            # In `q10 < motion < q90` both are of what stands in the middle.
            of = sides[i - 1] if i else sides[1]
            if not any(isinstance(inner, ast.Name) and not _QUANTILE.match(inner.id) for inner in ast.walk(of)):
                raise DataError(f"condition {text!r}: {side.id} is compared with no column")
            yield side, of, float(match[1].replace("_", ".")) / 100
        elif any(isinstance(inner, ast.Name) and _QUANTILE.match(inner.id) for inner in ast.walk(side)):
            raise DataError(f"condition {text!r}: a quantile stands alone on its side of a comparison")


def _rule(node: ast.expr) -> Rule:
    text = ast.unparse(node)
    if isinstance(node, ast.BoolOp) and len(node.values) == 2:  # "motion is None or motion > 0.3"
        missing, plain = node.values[0], _rule(node.values[1])
        if plain.limit is not None and ast.unparse(missing) == f"{plain.column} is None":
            return Rule(text, plain.column, plain.limit)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = node.left, node.comparators[0]
        if isinstance(right, ast.Name):
            left, right = right, left
        if isinstance(left, ast.Name) and (limit := _number(right)) is not None:
            return Rule(text, left.id, limit)
    names = [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)]
    return Rule(text, names[0] if len(set(names)) == 1 else None)


def _number(node: ast.expr) -> float | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _number(node.operand)
        return None if value is None else -value
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    return None


def _truth(node: ast.expr, columns: Mapping[str, Values]) -> Any:
    if isinstance(node, ast.BoolOp):
        parts = [_truth(value, columns) for value in node.values]
        together = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        return together.reduce(np.broadcast_arrays(*parts))
    if isinstance(node, ast.UnaryOp):
        return np.logical_not(_truth(node.operand, columns))
    assert isinstance(node, ast.Compare)
    sides = [node.left, *node.comparators]
    if isinstance(node.ops[0], ast.Is | ast.IsNot):
        missing = _missing(_value(node.left, columns))
        return missing if isinstance(node.ops[0], ast.Is) else ~missing
    values = [_value(side, columns) for side in sides]
    holds: Any = True
    for op, left, right in zip(node.ops, values, values[1:], strict=False):
        holds = holds & _compare(type(op), left, right)
    return holds


def _compare(op: type, left: Any, right: Any) -> Any:
    sign, function = _COMPARE[op]
    text = [_is_text(side) for side in (left, right)]
    if any(text):
        if not all(text) or sign not in ("==", "!="):
            raise DataError(f"text is compared by == or != with text, not by {sign}")
        return function(left, right) & ~_missing(left) & ~_missing(right)
    with np.errstate(invalid="ignore"):
        return function(left, right) & ~np.isnan(left) & ~np.isnan(right)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or value.dtype.kind == "O"


def _missing(values: Any) -> Any:
    if isinstance(values, str):
        return np.False_
    if _is_text(values):
        return np.array([value is None for value in values], dtype=bool)
    return np.isnan(values)


def _value(node: ast.expr, columns: Mapping[str, Values]) -> Any:
    if isinstance(node, ast.Name):
        return columns[node.id]
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else np.float64(cast(float, node.value))
    if isinstance(node, ast.UnaryOp):
        return -_numbers(_value(node.operand, columns))
    assert isinstance(node, ast.BinOp)
    left, right = (_numbers(_value(side, columns)) for side in (node.left, node.right))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _ARITHMETIC[type(node.op)](left, right)


def _numbers(value: Any) -> Any:
    if _is_text(value):
        raise DataError("arithmetic with text; expected numbers")
    return value


def find_quantiles(condition: Condition, tables: Callable[[], Iterable[pa.Table]]) -> dict[tuple[str, float], float]:
    """Compute the quantiles of a condition over all rows with values, holding 8 bytes per row for each."""
    wanted = condition.quantiles
    if not wanted:
        return {}
    values: dict[str, list[Values]] = {text: [] for text, _ in wanted}
    for table in tables():
        for text, found in values.items():
            found.append(condition.values(text, table))
    limits = {}
    for text, share in wanted:
        known = np.concatenate(values[text])
        known = known[np.isfinite(known)]  # without what is divided by zero
        if len(known) == 0:
            raise DataError(f"{text}: no row has a value to take a quantile of")
        limits[text, share] = float(np.quantile(known, share))
    return limits
