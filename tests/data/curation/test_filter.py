"""A filter keeps rows as they are, and writes down every other with column, value and limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stdit_data.curation.engine import rejects_path, run
from stdit_data.curation.filtering.filter import open_filter
from stdit_data.curation.filtering.presets import load_preset, preset_names
from stdit_data.curation.tables import open_rows
from stdit_data.errors import DataError
from stdit_data.workers.executors import Inline


@pytest.fixture
def scored(tmp_path: Path) -> str:
    """Ten scored clips, motion 0 to 9, of which the last has none."""
    rows = {
        "path": [f"/clips/{number}.mp4" for number in range(10)],
        "start": [0.5 * number for number in range(10)],
        "motion": pa.array([*map(float, range(9)), None], pa.float64()),
        "frames": list(range(10, 20)),
        "codec": ["h264", "vp9"] * 5,
        "tags": [["a"]] * 10,
    }
    pq.write_table(pa.table(rows), tmp_path / "scored.parquet")
    return str(tmp_path / "scored.parquet")


def filtered(scored: str, keep: str) -> tuple[pa.Table, list[dict[str, Any]]]:
    rows, out = open_rows(scored), scored.replace("scored", "kept")
    run(open_filter(keep, rows), rows, out, Inline())
    rejects = [json.loads(line) for line in Path(rejects_path(out)).read_text().splitlines()]
    return pq.read_table(out), rejects


def test_rows_are_kept_whole_and_the_others_are_written_down(scored: str) -> None:
    kept, rejects = filtered(scored, "motion >= 2 and frames < 18")
    given = pq.read_table(scored)
    assert kept.to_pylist() == given.slice(2, 6).to_pylist()
    assert kept.schema.remove_metadata() == given.schema
    assert rejects[0] == {
        "path": "/clips/0.mp4",
        "start": 0.0,
        "step": "filter",
        "reason": "not motion >= 2",
        "column": "motion",
        "value": 0.0,
        "limit": 2.0,
    }
    assert [(reject["column"], reject["value"], reject["limit"]) for reject in rejects] == [
        ("motion", 0.0, 2.0),
        ("motion", 1.0, 2.0),
        ("frames", 18.0, 18.0),
        ("motion", None, 2.0),  # the first rule that it breaks
    ]


def test_quantiles_are_numbers_in_what_is_written_down(scored: str) -> None:
    kept, rejects = filtered(scored, "motion > q25")
    assert kept["motion"].to_pylist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert {(reject["reason"], reject["limit"]) for reject in rejects} == {("not motion > 2.0", 2.0)}


def test_conditions_without_a_limit_have_a_reason_all_the_same(scored: str) -> None:
    kept, rejects = filtered(scored, "codec == 'vp9' and (motion > 5 or frames < 13)")
    assert kept["path"].to_pylist() == ["/clips/1.mp4", "/clips/7.mp4"]
    assert rejects[0]["reason"] == "not codec == 'vp9'"
    assert (rejects[0]["value"], rejects[0]["limit"]) == ("h264", None)
    assert rejects[2]["reason"] == "not (motion > 5 or frames < 13)"
    assert "column" not in rejects[2]


def test_none_or_all_may_be_kept(scored: str) -> None:
    assert len(filtered(scored, "frames > 100")[0]) == 0
    kept, rejects = filtered(scored, "frames > 0")
    assert (len(kept), rejects) == (10, [])


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("motoin > 1", "did you mean 'motion'"),
        ("codec > 3", "text is compared by == or != with text"),
        ("tags == 'a'", "column 'tags' is of type list"),
    ],
)
def test_wrong_conditions_are_found_before_a_row_is_read(scored: str, keep: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_filter(keep, open_rows(scored))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_sources_and_conditions(name: str) -> None:
    from stdit_data.curation.cut import CutStep
    from stdit_data.curation.filtering.expression import Condition

    preset = load_preset(name)
    assert preset.description
    assert preset.rules
    for rule in preset.rules:
        assert rule.source.strip(), rule.keep
        assert rule.column_from.startswith(("stdit data ", "a column of your own")), rule.keep
        Condition(rule.keep)
    CutStep(**preset.cut)
    columns = [column for rule in preset.rules for column in Condition(rule.keep).columns]
    whole = Condition(preset.condition(columns))
    assert len(whole.rules) >= len(preset.rules)
    assert set(whole.columns) == set(columns)


def test_a_preset_names_the_columns_that_are_missing() -> None:
    preset = load_preset("basic")
    known = ["black_share", "sharpness", "letterbox"]
    with pytest.raises(DataError) as caught:
        preset.condition(known)
    said = str(caught.value)
    assert said.startswith(
        "preset basic needs columns that the manifest lacks: frozen_share (for frozen_share is None or"
    )
    assert "stdit data score" in said
    assert said.endswith("; `partly=True` applies the other rules alone")
    assert preset.condition(known, partly=True) == "black_share <= 0.1 and sharpness >= 5 and letterbox <= 0.05"
    with pytest.raises(DataError, match="needs columns"):  # no rule is left
        preset.condition(["path"], partly=True)
    with pytest.raises(DataError, match=r"no preset 'basics'; there are basic, nemo-curator"):
        load_preset("basics")
