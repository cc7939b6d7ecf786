"""Keep the rows that fulfil a condition; record every other row with the column, value and limit that decided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from stdit_data.curation.engine import Result
from stdit_data.curation.filtering.expression import Condition, column_values, find_quantiles
from stdit_data.curation.tables import Rows, to_dicts


@dataclass(frozen=True)
class FilterStep:
    """Keeps rows by a condition without quantiles; see `open_filter`.

    Args:
        keep: the condition, as `expression` describes it.
    """

    keep: str

    name = "filter"
    shard_rows = 65536
    gpus = 0.0
    has_model = False

    def settings(self) -> dict[str, Any]:
        return {"keep": self.keep}

    def schema(self, given: pa.Schema) -> pa.Schema:
        return given

    def open(self) -> Condition:
        return Condition(self.keep)

    def run(self, shard: pa.Table, opened: Condition) -> Result:
        masks = opened.masks(shard)
        kept = np.logical_and.reduce(masks) if masks else np.ones(len(shard), bool)
        rejects: list[dict[str, Any]] = []
        dropped = np.flatnonzero(~kept)
        if len(dropped):
            # The first rule that a row breaks is the one that it is dropped by.
            broken = np.argmin(np.stack(masks)[:, dropped], axis=0)
            names = [name for name in ("path", "start", "end") if name in shard.column_names]
            places = to_dicts(shard.select(names).take(pa.array(dropped)))
            rules = opened.rules
            columns = {rule.column: column_values(shard, rule.column) for rule in rules if rule.column}
            for place, row, number in zip(places, dropped, broken, strict=True):
                rule = rules[number]
                broken_rule = f"({rule.text})" if " or " in rule.text else rule.text
                reject = {**place, "step": self.name, "reason": f"not {broken_rule}"}
                if rule.column:
                    reject |= {"column": rule.column, "value": _plain(columns[rule.column][row]), "limit": rule.limit}
                rejects.append(reject)
        return Result(shard.filter(pa.array(kept)), rejects)


def open_filter(keep: str, rows: Rows) -> FilterStep:
    """Make a filter for a manifest: check the columns, and compute quantiles over all of its rows.

    Raises:
        DataError: not a condition, or a column that the manifest lacks.
    """
    condition = Condition(keep)
    condition.check_columns(rows.schema.names)
    limits = find_quantiles(condition, lambda: rows.shards(FilterStep.shard_rows))
    step = FilterStep(condition.resolved(limits).text)
    step.open().masks(rows.schema.empty_table())  # finds comparisons of text with numbers
    return step


def _plain(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else float(value)
    return value
