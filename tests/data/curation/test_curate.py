"""A folder of raw videos to a training set in one call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stdit_data.curation.caption import CaptionStep
from stdit_data.curation.captioners.prompts import Answer, Captioner, Question
from stdit_data.curation.curate import Recipe, curate, steps_folder
from stdit_data.curation.cut import CutStep
from stdit_data.curation.engine import rejects_path
from stdit_data.curation.score import ScoreStep
from stdit_data.curation.tables import open_rows
from stdit_data.errors import DataError
from stdit_data.workers.executors import Inline
from stdit_data.workers.work import Progress, Unavailable


@dataclass(frozen=True)
class Told(CaptionStep):
    """Describes images, refuses videos of 3 s in the first picture's red, or is lost."""

    lost: bool = False

    def open(self) -> Captioner:
        def answer(questions: Sequence[Question]) -> list[Answer]:
            if self.lost:
                raise Unavailable("the server is gone")
            return [Answer("A picture." if len(one.images) == 1 else "I cannot see it.") for one in questions]

        return answer


def recipe(caption: CaptionStep | None, keep: str = "motion is None or motion > 0.1") -> Recipe:
    return Recipe(CutStep(), ScoreStep(size=96), keep, caption=caption)


def inline(name: str) -> Inline:
    return Inline()


def seen(name: str) -> Progress:
    return lambda done, total: None


def test_raw_videos_to_a_training_set(raw: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "set.parquet")
    rows = open_rows(str(raw))
    with pytest.raises(Unavailable, match="the server is gone; finished shards are kept"):
        list(curate(rows, out, inline, recipe(Told(model="told", lost=True)), progress=seen))
    assert not Path(out).exists()
    outcomes = dict(curate(rows, out, inline, recipe(Told(model="told")), progress=seen))
    assert list(outcomes) == ["cut", "score", "filter", "dedup", "caption", "flags"]
    assert all(outcomes[name].resumed == outcomes[name].shards for name in ("cut", "score", "filter", "dedup"))
    assert [Path(row["path"]).name for row in pq.read_table(out).to_pylist()] == ["photo.png"]
    rejects = [json.loads(line) for line in Path(rejects_path(out)).read_text().splitlines()]
    steps = Counter(reject["step"] for reject in rejects)
    assert steps["cut"] == 1  # broken.mp4
    assert any(one["step"] == "filter" and one["column"] == "motion" for one in rejects)
    assert steps["dedup"] == 2  # the copy, and the one that is encoded anew
    assert sum(one["reason"] == "not caption_flag is None" for one in rejects) == outcomes["caption"].rows - 1
    # Without captions, and with another condition, only the steps after it run again.
    other = dict(curate(rows, out, inline, recipe(None, "motion > 0.1"), progress=seen))
    assert list(other) == ["cut", "score", "filter", "dedup"]
    assert other["score"].resumed == other["score"].shards
    assert other["filter"].resumed == 0
    assert other["dedup"].rows == pq.read_metadata(out).num_rows == outcomes["dedup"].rows - 1
    assert (Path(steps_folder(out)) / "2-score.parquet").exists()


def test_conditions_are_checked_first_and_an_empty_set_is_told(raw: Path, tmp_path: Path) -> None:
    out, rows = str(tmp_path / "set.parquet"), open_rows(str(raw))
    with pytest.raises(DataError, match="motin"):
        next(curate(rows, out, inline, recipe(None, "motin > 1"), progress=seen))
    assert not Path(steps_folder(out)).exists()
    (tmp_path / "in.csv").write_text(f"path\n{raw}/still.mp4\n")
    with pytest.raises(DataError, match="filter: none of 1 rows is left"):
        list(curate(open_rows(str(tmp_path / "in.csv")), out, inline, recipe(None, "motion > 9"), progress=seen))
