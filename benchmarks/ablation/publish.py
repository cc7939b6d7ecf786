"""Write results.md, with tables and pictures beside it, from the finished runs of plan.md or larger.md.

    uv run python benchmarks/ablation/publish.py runs/ranking
    uv run python benchmarks/ablation/publish.py runs/ranking-larger/longer --study longer

All numbers and verdicts follow from the runs by the rules of the plan.
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stdit_data.storage.atomic import replace_text
from stdit_train.ablation.results import HELD_OUT, LOSS, SEEN, Result, by_arm, read_result, write_csv
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import from_dict
from stdit_train.evaluation.confidence import Interval, mean_interval, paired_difference

VARIANTS = ("dit", "seq", "parallel", "latte")
RECIPES = {"published": "iDDPM and AdamW", "demo": "rectified flow and Muon"}
TABLES = {"steps": "equal steps", "parameters": "parameters matched"}
CONTRASTS = (("dit", "seq"), ("seq", "parallel"), ("parallel", "latte"))  # first claimed better; the last pair level
LEVEL_PAIR = CONTRASTS[-1]
LEVEL = 0.01  # share of seq's mean loss, on either side of zero
SETTLED = (0.8, 0.9, 1.0)  # shares of the steps at which the verdicts must be the same
PICTURES = ("curves.png", "final.png")
COPIED = (*PICTURES, "differences.csv")  # unchanged, beside the page
DIFFER = ("model", "seed")  # settings in which a recipe's runs may differ
WIDTH = 118

INTRODUCTION = """# Testing the report's ranking: {title}

These results follow the rules of [{plan}]({plan}), which was written before the runs. Open-Sora 1.0's report claims
**dit > seq > parallel, and latte level with parallel**. Differences are the first arm minus the second, paired by
seed, with Student's 95 % interval. A negative difference in validation loss favours the first arm, and so does a
positive one in the share of videos with colour, shape and motion correct. Runs may have shared the machine, so times
are not compared here; see [cost.md](../cost.md).

    {runs}
    uv run python benchmarks/ablation/publish.py {folder}{option}
{more}"""
LONGER = """
dit and seq alone were also trained four times as long: [longer-results.md](longer-results.md). What both studies say
together is in [larger.md](larger.md#outcome).
"""


@dataclass(frozen=True)
class Study:
    """What one plan has: its pages, its runs, and the seeds that a verdict needs to count."""

    name: str
    title: str
    plan: str
    runs: str  # the command that makes the runs, without the folder
    seeds: int
    matches: tuple[str, ...] = ("steps",)
    contrasts: tuple[tuple[str, str], ...] = CONTRASTS[:1]

    @property
    def prefix(self) -> str:
        """What its files' names begin with, beside those of the first study."""
        return "" if self is FIRST else f"{self.name}-"

    def introduction(self, folder: str) -> str:
        """Return the head of its page, for runs in `folder`."""
        runs = f"{self.runs} {folder}" if self is FIRST else f"{self.runs} {Path(folder).parent} {self.name}"
        option = "" if self is FIRST else f" --study {self.name}"
        more = LONGER if self is FIRST else ""
        return INTRODUCTION.format(title=self.title, plan=self.plan, runs=runs, folder=folder, option=option, more=more)


FIRST = Study("first", "results", "plan.md", "benchmarks/ablation/run.sh", 6, tuple(TABLES), CONTRASTS)
LARGER = "benchmarks/ablation/larger.sh"
STUDIES = {
    study.name: study
    for study in (
        FIRST,
        Study("longer", "four times the steps", "larger.md", LARGER, 4),
        Study("larger", "a larger model, four times the steps", "larger.md", LARGER, 4),
    )
}


@dataclass(frozen=True)
class Table:
    """The finished runs of one recipe and one way to match."""

    recipe: str
    match: str
    results: tuple[Result, ...]
    files: tuple[str, ...] = ()  # those of `COPIED` that exist
    study: Study = FIRST

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.recipe}-{self.match}"

    @property
    def published(self) -> str:
        """What the names of its published files begin with."""
        return f"{self.study.prefix}{self.name}"

    def losses(self, share: float = 1.0) -> dict[str, dict[int, float]]:
        """Return the validation losses after a share of the steps, by arm and seed."""
        found: dict[str, dict[int, float]] = {}
        for result in self.results:
            reached = [loss for step, loss in result.curve if step <= round(share * result.steps)]
            if reached:
                found.setdefault(result.arm, {})[result.seed] = reached[-1]
        return found

    def verdict(self, pair: tuple[str, str], share: float = 1.0) -> str:
        """Return the verdict on a contrast, by the losses after a share of the steps."""
        difference = paired(self.losses(share), pair)
        return verdict(pair, difference, self.losses(share)) if difference is not None else "not run yet"

    def settled(self, pair: tuple[str, str]) -> bool:
        """Tell whether the verdict was the same over the last fifth of the steps."""
        return len({self.verdict(pair, share) for share in SETTLED}) == 1


def paired(values: Mapping[str, Mapping[int, float]], pair: tuple[str, str]) -> Interval | None:
    """Return the first arm minus the second over the seeds that both have; None without such a seed."""
    first, second = (values.get(arm, {}) for arm in pair)
    return paired_difference(first, second) if first.keys() & second.keys() else None


def verdict(pair: tuple[str, str], difference: Interval, losses: Mapping[str, Mapping[int, float]]) -> str:
    """Return the verdict that plan.md allows for a difference of losses."""
    low, high = difference.low, difference.high
    if low is None or high is None:
        return "one seed, no conclusion"
    if pair == LEVEL_PAIR:
        margin = LEVEL * mean_interval(list(losses["seq"].values())).mean if "seq" in losses else 0.0
        if max(-low, high) <= margin:
            return "confirmed: level"
        if max(low, -high) > margin:  # all of it on one side
            return f"contradicted: {pair[difference.mean > 0]} is better"
        return "not separated"
    if not difference.separated:
        return "not separated"
    return "confirmed" if difference.mean < 0 else "contradicted"


def read_table(folder: Path, recipe: str, match: str, study: Study = FIRST) -> Table:
    """Read the finished runs of one folder; none where the folder does not exist."""
    runs, where = finished_runs(folder, recipe, match), folder / f"{recipe}-{match}"
    results = tuple(read_result(run, from_dict(run.read_config()), arm) for arm, run in runs)
    return Table(recipe, match, results, tuple(name for name in COPIED if (where / name).is_file()), study)


def finished_runs(folder: Path, recipe: str, match: str) -> list[tuple[str, RunFolder]]:
    """Return arm and folder of each finished run."""
    where = folder / f"{recipe}-{match}"
    runs = [(arm, RunFolder(path)) for arm in VARIANTS for path in sorted(where.glob(f"{arm}-seed*"))]
    return [(arm, run) for arm, run in runs if run.config_file.is_file() and "finished_at_step" in run.metadata()]


def check_settings(folder: Path) -> None:
    """Check that a recipe's runs, matched either way, differ in architecture and seed alone.

    Raises:
        ValueError: they differ in another setting.
    """
    for recipe in RECIPES:
        runs = [run for match in TABLES for _, run in finished_runs(folder, recipe, match)]
        settings = [{key: value for key, value in run.read_config().items() if key not in DIFFER} for run in runs]
        for run, theirs in zip(runs, settings, strict=True):
            for key, value in theirs.items():
                if value != settings[0][key]:
                    raise ValueError(f"{run.path} and {runs[0].path} differ in {key}: make these runs again")


def page(tables: Sequence[Table], folder: str) -> str:
    """Return the whole page of a study."""
    parts = [tables[0].study.introduction(folder), "## Verdicts", "", *answer(tables), ""]
    for table in tables:
        title = f"Recipe `{table.recipe}` ({RECIPES[table.recipe]}), {TABLES[table.match]}"
        parts += [f"## {title}", "", *section(table), ""]
    return "\n".join(parts).rstrip() + "\n"


def answer(tables: Sequence[Table]) -> list[str]:
    """Return the verdicts and, for each way to match, those that count because both recipes agree."""
    columns = [f"{table.recipe}, {TABLES[table.match]}" for table in tables]
    columns += [f"counts, {TABLES[match]}" for match in dict.fromkeys(table.match for table in tables)]
    lines = ["| claim | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for pair in tables[0].study.contrasts:
        cells = [_said(table, pair) for table in tables]
        matches = dict.fromkeys(table.match for table in tables)
        cells += [counted([table for table in tables if table.match == match], pair) for match in matches]
        lines.append(f"| {_claim(pair)} | " + " | ".join(cells) + " |")
    seeds = tables[0].study.seeds
    note = (
        f"A verdict counts as a result of this study if both recipes agree on it, each with {seeds} seeds, and if "
        "it was the same at 80, 90 and 100 % of the steps (otherwise it is marked as not settled)."
    )
    return [*lines, "", *textwrap.wrap(note, WIDTH)]


def counted(tables: Sequence[Table], pair: tuple[str, str]) -> str:
    """Return the verdict that the tables of all recipes agree on; "no" where they disagree or seeds are missing."""
    said = {_said(table, pair) for table in tables}
    if len(tables) < len(RECIPES) or len(said) > 1:
        return "no"
    (only,) = said
    return f"**{only}**" if only.startswith(("confirmed", "contradicted")) else "no"


def _said(table: Table, pair: tuple[str, str]) -> str:
    said, difference = table.verdict(pair), paired(table.losses(), pair)
    if difference is None:
        return said
    if difference.count < table.study.seeds:
        return f"{difference.count} of {table.study.seeds} seeds yet ({said})"
    return said if table.settled(pair) else f"not settled ({said} at the end)"


def _claim(pair: tuple[str, str]) -> str:
    return f"{pair[0]} level with {pair[1]}" if pair == LEVEL_PAIR else f"{pair[0]} better than {pair[1]}"


def section(table: Table) -> list[str]:
    """Return the section of a table: its arms and contrasts."""
    if not table.results:
        return ["Not run yet."]
    lines = [
        "| arm | runs | parameters | GFLOPs per step | validation loss | seen, all correct | held-out, all correct |"
    ]
    lines.append("|---|" + "---:|" * 6)
    measured = {measure: by_arm(table.results, measure) for measure in (LOSS, SEEN, HELD_OUT)}
    for arm in VARIANTS:
        runs = [result for result in table.results if result.arm == arm]
        if not runs:
            continue
        cells = [arm, str(len(runs)), f"{runs[0].parameters:,}", f"{runs[0].step_flops / 1e9:.2f}"]
        for measure, digits in ((LOSS, 4), (SEEN, 2), (HELD_OUT, 2)):
            values = list(measured[measure].get(arm, {}).values())
            cells.append(mean_interval(values).text(digits) if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| contrast | validation loss | of seq's | verdict | seen | held-out |"]
    lines.append("|---|---:|---:|---|---:|---:|")
    for pair in table.study.contrasts:
        differences = [paired(measured[measure], pair) for measure in (LOSS, SEEN, HELD_OUT)]
        loss, *shares = differences
        if loss is None:
            continue
        seq = measured[LOSS].get("seq")
        of_seq = "" if seq is None else f"{loss.mean / mean_interval(list(seq.values())).mean:+.1%}"
        cells = [" - ".join(pair), _signed(loss, 4), of_seq, _said(table, pair)]
        cells += ["" if share is None else _signed(share, 3) for share in shares]
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        *(f"![{Path(name).stem}]({table.published}-{name})" for name in table.files if name in PICTURES),
    ]


def _signed(difference: Interval, digits: int) -> str:
    sign = "+" if difference.mean >= 0 else ""
    return sign + difference.text(digits)


def copy_files(folder: Path, table: Table, out: Path) -> None:
    """Copy the runs as CSV, and the pictures and differences of a finished ablation, beside the page."""
    if table.results:
        write_csv(table.results, out / f"{table.published}.csv")
    for name in table.files:
        shutil.copyfile(folder / table.name / name, out / f"{table.published}-{name}")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="publish.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder that run.sh wrote to")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the page")
    parser.add_argument("--study", choices=STUDIES, default=FIRST.name, help="whose plan the runs follow")
    given = parser.parse_args(arguments)
    study = STUDIES[given.study]
    try:
        check_settings(given.folder)
    except ValueError as error:
        print(f"publish: {error}", file=sys.stderr)
        return 2
    tables = [read_table(given.folder, recipe, match, study) for match in study.matches for recipe in RECIPES]
    if not any(table.results for table in tables):
        print(f"publish: no finished runs in {given.folder}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    for table in tables:
        copy_files(given.folder, table, given.out)
    if (given.folder / "sweep" / "runs.csv").is_file():
        shutil.copyfile(given.folder / "sweep" / "runs.csv", given.out / f"{study.prefix}sweep.csv")
    results = given.out / f"{study.prefix}results.md"
    replace_text(results, page(tables, str(given.folder)))
    for table in tables:
        print(f"{table.name}: {len(table.results)} runs")
    print(results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
