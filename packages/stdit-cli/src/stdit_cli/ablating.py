"""What `stdit ablate` shows: a bar for each run, a table, a ranking, the files."""

import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from typer import Exit

from stdit_cli.training import INTERRUPTED, TrainingBar, with_demo_parts
from stdit_train.config.load import ConfigError, load_stage, parse_overrides

if TYPE_CHECKING:
    from stdit_train.ablation.arms import Arm
    from stdit_train.ablation.results import Ranking, Result
    from stdit_train.ablation.runner import Study

OPTIONS = {"steps": "--steps", "minutes": "--minutes", "seed": "--seeds", "model.variant": "--variants"}


@dataclass(frozen=True)
class Request:
    """The options of `stdit ablate`."""

    variants: str | None
    varied: list[str]
    match: str
    seeds: int
    steps: int | None
    minutes: float | None
    quick: bool
    prompts: int
    stage: str
    out: Path
    settings: list[str]


def run_ablation(request: Request) -> None:
    """Train and score what isn't yet, then report."""
    study = resolved(request)

    from stdit_train.ablation.report import QUICK, diverged_lines, rankings_of, write_ablation_report
    from stdit_train.ablation.results import separation
    from stdit_train.ablation.runner import Ablation

    console, started = Console(highlight=False), time.perf_counter()
    ablation = Ablation(study, request.out, console.print)
    with ExitStack() as bars:

        def watch(arm: "Arm", seed: int) -> TrainingBar:
            bars.close()
            config = ablation.config(arm, seed)
            length = f"{config.minutes:.2g} minutes" if config.minutes else f"{config.steps} steps"
            console.print(f"{arm.name}, seed {seed}: {length}")
            return bars.enter_context(TrainingBar(console, quiet=True))

        def said(line: str) -> None:
            bars.close()
            console.print(line)

        ablation.said = said
        try:
            finished = ablation.run(watch)
        except KeyboardInterrupt:
            finished = False
    results = ablation.results()
    command = shlex.join(["stdit", *sys.argv[1:]])
    files = write_ablation_report(ablation, results, command, request.quick) if results else []
    if not finished:
        console.print("stopped, saved; the same command goes on from here")
        raise Exit(INTERRUPTED)
    rankings = rankings_of(ablation, results)
    if results:
        console.print(costs_table(results))
    if rankings:
        console.print(outcomes_table(rankings))
    for line in diverged_lines(ablation):
        console.print(line)
    for ranking in rankings:
        console.print(f"by {ranking.measure}: {ranking.line}\n  {separation(ranking)}")
    for file in files:
        console.print(f"{file}")
    console.print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    if request.quick:
        console.print(QUICK)


def resolved(request: Request) -> "Study":
    """What the options ask for, checked before anything is trained."""
    from stdit_train.ablation.arms import MATCHES, make_arms, parse_variants, parse_vary

    if request.match not in MATCHES:
        raise ConfigError(f"--match {request.match}: choose {', '.join(MATCHES)}")
    given = parse_overrides(request.settings)
    for key, option in {
        "steps": "--steps",
        "minutes": "--minutes",
        "seed": "--seeds",
        "model.variant": "--variants",
    }.items():
        if key in given:
            raise ConfigError(f"--set {key}: {option} is there for that")
    base = with_demo_parts(load_stage(request.stage, given), given)
    varied = [parse_vary(text) for text in request.varied]
    variants = parse_variants(request.variants or (base.model.variant if varied else "dit,seq,parallel,latte"))
    arms = make_arms(base, variants, varied)

    from stdit_train.ablation.runner import Study

    return Study(
        base=base,
        arms=arms,
        seeds=request.seeds,
        match=request.match,  # one of MATCHES
        steps=request.steps,
        minutes=request.minutes,
        prompts=request.prompts,
        given=given,
    )


def costs_table(results: "list[Result]") -> Table:
    """What an arm's runs cost, a line an arm."""
    from statistics import mean

    table = Table("arm", "runs", "steps", "parameters", "GFLOPs a step", "seconds a step")
    for name in dict.fromkeys(result.arm for result in results):
        runs = [result for result in results if result.arm == name]
        cells = [str(len(runs)), f"{mean(r.steps for r in runs):.0f}", f"{runs[0].parameters:,}"]
        cells += [f"{runs[0].step_flops / 1e9:.3g}", f"{mean(r.seconds_per_step for r in runs):.3f}"]
        table.add_row(name, *cells)
    return table


def outcomes_table(rankings: "list[Ranking]") -> Table:
    """What they came to, best first by the first measure."""
    from stdit_train.ablation.results import LOSS

    table = Table("arm", *(ranking.measure for ranking in rankings))
    for name in rankings[0].means:
        shown = (ranking.means[name].text(4 if ranking.measure == LOSS else 3) for ranking in rankings)
        table.add_row(name, *shown)
    return table
