"""`stdit ablate`: train several architectures or settings under the same conditions, and compare them."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stdit_train.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from stdit_cli.console import TrainingBar
    from stdit_train.ablation.arms import Arm, Study
    from stdit_train.ablation.results import Result

MINUTES, SEEDS, PROMPTS = 30.0, 3, 24
QUICK_MINUTES, QUICK_SEEDS, QUICK_PROMPTS = 3.0, 1, 6
ARMS, LENGTH, OUTPUT = "Arms", "Length and fairness", "Output"
VARIANTS = "dit,seq,parallel,latte"
OWN_OPTIONS = {"steps": "--steps", "minutes": "--minutes", "seed": "--seeds", "model.variant": "--variants"}


@dataclass(frozen=True)
class AblateOptions:
    """The options of `stdit ablate`, with defaults filled in."""

    variants: str | None
    vary: list[str]
    match: str
    seeds: int
    steps: int | None
    minutes: float | None
    quick: bool
    prompts: int
    stage: str
    out: Path
    settings: list[str]


def ablate(
    variants: Annotated[
        str | None,
        typer.Option(
            help="Variants to compare, separated by commas: dit, seq, parallel, latte.",
            show_default="all; with --vary, the stage's own",
            rich_help_panel=ARMS,
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B",
            help="Setting and values to compare, e.g. objective.name=iddpm,flow.",
            rich_help_panel=ARMS,
        ),
    ] = None,
    match: Annotated[
        str,
        typer.Option(help="What to hold equal across arms: steps, parameters, flops or time.", rich_help_panel=LENGTH),
    ] = "steps",
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs per arm; arms are paired by seed.", show_default=str(SEEDS), rich_help_panel=LENGTH
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps per run, instead of a time budget.", rich_help_panel=LENGTH)
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Time budget of all runs together, in minutes.",
            show_default=f"{MINUTES:g}",
            rich_help_panel=LENGTH,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"Take a quick look instead of a ranking: {QUICK_MINUTES:g} minutes, {QUICK_SEEDS} seed, "
            f"{QUICK_PROMPTS} prompts, unless given. What these allow here is measured and printed first.",
            rich_help_panel=LENGTH,
        ),
    ] = False,
    prompts: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Prompts per split (seen, held-out) for scoring.",
            show_default=str(PROMPTS),
            rich_help_panel=LENGTH,
        ),
    ] = None,
    stage: Annotated[
        str, typer.Option(help="Stage whose settings all arms start from.", rich_help_panel=ARMS)
    ] = "demo",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the runs; an interrupted ablation in it is resumed.",
            show_default="runs/ablation",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of the stage.", rich_help_panel=ARMS),
    ] = None,
) -> None:
    """Train arms with the same data, noise and initial weights, and compare them with paired intervals."""
    if steps is not None and minutes is not None:
        raise ConfigError("--steps and --minutes both set the length: give one")
    run_ablation(
        AblateOptions(
            variants=variants,
            vary=vary or [],
            match=match,
            seeds=seeds or (QUICK_SEEDS if quick else SEEDS),
            steps=steps,
            minutes=None if steps else minutes or (QUICK_MINUTES if quick else MINUTES),
            quick=quick,
            prompts=(QUICK_PROMPTS if quick else PROMPTS) if prompts is None else prompts,
            stage=stage,
            out=out or Path("runs/ablation-quick" if quick else "runs/ablation"),
            settings=setting or [],
        )
    )


def run_ablation(options: AblateOptions) -> None:
    """Train and score the runs that are missing, then print tables and write the report.

    Raises:
        Exit: 130, interrupted.
    """
    study = make_study(options)

    from rich.console import Console

    from stdit_cli.console import INTERRUPTED, TrainingBar, shown_logs
    from stdit_train.ablation.notes import QUICK, compare, forecast, time_taken
    from stdit_train.ablation.report import write_ablation_report
    from stdit_train.ablation.results import separation
    from stdit_train.ablation.runner import Ablation

    console = Console(highlight=False, markup=False)
    bars = ExitStack()

    def write(line: str) -> None:
        bars.close()
        console.print(line)

    def watch(arm: Arm, seed: int) -> TrainingBar:
        bars.close()
        console.print(f"{arm.name}, seed {seed}: {ablation.config(arm, seed).steps} steps")
        return bars.enter_context(TrainingBar(console, quiet=True))

    with bars, shown_logs("stdit_train.ablation", write):
        ablation = Ablation(study, options.out)
        for line in forecast(ablation, options.quick):
            console.print(line, soft_wrap=True)
        try:
            finished = ablation.run(watch)
        except KeyboardInterrupt:
            finished = False
    results = ablation.results()
    command = shlex.join(["stdit", *sys.argv[1:]])
    files = write_ablation_report(ablation, results, command, options.quick) if results else []
    if not finished:
        console.print("stopped and saved; run the same command again to resume")
        raise typer.Exit(INTERRUPTED)
    compared = compare(ablation, results)
    if results:
        console.print(costs_table(results))
        console.print(outcomes_table(results, list(compared.rankings[0].means) if compared.rankings else []))
    for line in compared.notes:
        console.print(line, soft_wrap=True)
    for ranking in compared.rankings:
        console.print(f"by {ranking.measure}: {ranking.line}\n  {separation(ranking)}")
    for file in files:
        console.print(f"{file}", soft_wrap=True)
    if took := time_taken(ablation):
        console.print(took)
    if options.quick:
        console.print(QUICK)


def make_study(options: AblateOptions) -> Study:
    """Resolve the arms and their common settings, before anything is trained.

    Raises:
        ConfigError: an option or setting that does not exist or does not make sense.
    """
    from stdit_train.ablation.arms import MATCHES, Study, make_arms, parse_variants, parse_vary
    from stdit_train.config.load import load_stage, parse_overrides
    from stdit_train.config.resolve import resolve_config

    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a file: name a folder")
    if options.match not in MATCHES:
        raise ConfigError(f"--match {options.match}: choose {', '.join(MATCHES)}")
    given = parse_overrides(options.settings)
    for key, option in OWN_OPTIONS.items():
        if key in given:
            raise ConfigError(f"--set {key}: use {option} instead")
    base = resolve_config(load_stage(options.stage, given), given)
    varied = [parse_vary(text) for text in options.vary]
    variants = parse_variants(options.variants or (base.model.variant if varied else VARIANTS))
    arms = make_arms(base, variants, varied)

    return Study(
        base=base,
        arms=arms,
        seeds=options.seeds,
        match=options.match,
        steps=options.steps,
        minutes=options.minutes,
        prompts=options.prompts,
        given=given,
    )


def costs_table(results: list[Result]) -> Table:
    """Tabulate what each arm's runs cost: steps, parameters, FLOPs and seconds."""
    from statistics import mean

    from rich.table import Table

    table = Table("arm", "runs", "steps", "parameters", "GFLOPs/step", "seconds/step")
    for name in dict.fromkeys(result.arm for result in results):
        runs = [result for result in results if result.arm == name]
        cells = [str(len(runs)), f"{mean(r.steps for r in runs):.0f}", f"{runs[0].parameters:,}"]
        cells += [f"{runs[0].step_flops / 1e9:.3g}", f"{mean(r.seconds_per_step for r in runs):.3f}"]
        table.add_row(name, *cells)
    return table


def outcomes_table(results: list[Result], order: list[str]) -> Table:
    """Tabulate each arm's mean of every measure, the arms in an order and then those that it leaves out."""
    from rich.table import Table

    from stdit_train.ablation.results import HELD_OUT, LOSS, SEEN, by_arm
    from stdit_train.evaluation.confidence import mean_interval

    measures = {name: found for name in (LOSS, SEEN, HELD_OUT) if (found := by_arm(results, name))}
    table = Table("arm", *measures)
    for arm in dict.fromkeys([*order, *(result.arm for result in results)]):
        runs = {name: list(found.get(arm, {}).values()) for name, found in measures.items()}
        shown = (mean_interval(v).text(4 if name == LOSS else 3) if v else "" for name, v in runs.items())
        table.add_row(arm, *shown)
    return table
