"""Run cut, score, filter, dedup and caption one after another: raw video to a training set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stdit_data.curation import dedup
from stdit_data.curation.caption import CaptionStep
from stdit_data.curation.cut import CutStep
from stdit_data.curation.engine import Outcome, Step, check_out, rejects_path, run
from stdit_data.curation.filtering.expression import Condition
from stdit_data.curation.filtering.filter import FilterStep, open_filter
from stdit_data.curation.score import ScoreStep
from stdit_data.curation.tables import Rows, open_rows, write_rows
from stdit_data.errors import DataError
from stdit_data.storage import atomic, files, urls
from stdit_data.workers.executors import Executor
from stdit_data.workers.work import Progress

GOOD = "caption_flag is None"


@dataclass(frozen=True)
class Recipe:
    """The settings of all steps.

    Attributes:
        cut, score: as they are.
        keep: the condition of the filter, see `expression`.
        hash, matching: of dedup.
        caption: as it is, see `caption.checked`; None leaves captions out.
    """

    cut: CutStep
    score: ScoreStep
    keep: str
    hash: dedup.HashStep = field(default_factory=dedup.HashStep)
    matching: dedup.Matching = field(default_factory=dedup.Matching)
    caption: CaptionStep | None = None

    def scored_columns(self, rows: Rows) -> list[str]:
        """Return the columns of a manifest after cut and score, which the filter's condition may use."""
        return list(self.score.schema(self.cut.schema(rows.schema)).names)


def steps_folder(out: str) -> str:
    """Return the folder that holds the manifest of every step: clips.steps beside clips.parquet."""
    return f"{out.removesuffix('.parquet')}.steps"


def curate(
    rows: Rows, out: str, executor: Callable[[str], Executor], recipe: Recipe, *, progress: Callable[[str], Progress]
) -> Iterator[tuple[str, Outcome]]:
    """Run the steps, and write `out` and everything that any of them rejected.

    The manifests of all steps are kept in `steps_folder`, so a run that was stopped resumes within its step, and a
    changed setting runs again only what depends on it.

    Args:
        rows: videos and images, or a manifest of them.
        out: the manifest to write, .parquet.
        executor: where the step of a name runs, see `engine.run`.
        recipe: settings.
        progress: makes the `Progress` of the step of a name.

    Yields:
        The name and outcome of each step.

    Raises:
        DataError: the condition does not fit (before anything runs), a step failed, or no clip is left.
    """
    check_out(out, rows)
    Condition(recipe.keep).check_columns(recipe.scored_columns(rows))
    folder, done = steps_folder(out), []

    def place(number: int, name: str) -> str:
        return urls.join(folder, f"{number}-{name}.parquet")

    def finished(name: str, outcome: Outcome, given: Rows) -> tuple[str, Outcome]:
        if not outcome.rows:
            raise DataError(f"{name}: none of {given.count} rows is left, see {rejects_path(outcome.out)}")
        done.append(outcome.out)
        return name, outcome

    steps: list[Step] = [recipe.cut, recipe.score]
    for number, step in enumerate(steps, 1):
        outcome = run(step, rows, place(number, step.name), executor(step.name), progress=progress(step.name))
        yield finished(step.name, outcome, rows)
        rows = open_rows(outcome.out)
    filtering = open_filter(recipe.keep, rows)
    outcome = run(filtering, rows, place(3, "filter"), executor("filter"), progress=progress("filter"))
    yield finished("filter", outcome, rows)
    rows = open_rows(outcome.out)
    settings: dict[str, Any] = {"step": recipe.hash, "matching": recipe.matching}
    outcome = dedup.dedup(rows, place(4, "dedup"), executor("dedup"), **settings, progress=progress("dedup"))
    yield finished("dedup", outcome, rows)
    rows = open_rows(outcome.out)
    if recipe.caption is not None:
        outcome = run(recipe.caption, rows, place(5, "caption"), executor("caption"), progress=progress("caption"))
        yield finished("caption", outcome, rows)
        rows = open_rows(outcome.out)
        outcome = run(FilterStep(GOOD), rows, place(6, "flags"), executor("flags"), progress=progress("flags"))
        yield finished("flags", outcome, rows)
        rows = open_rows(outcome.out)
    with atomic.open_write(rejects_path(out)) as file:
        for manifest in done:
            with files.open_binary(rejects_path(manifest)) as part:
                file.write(part.read())
    write_rows(out, rows.shards(65536), rows.schema)
