"""What is told of an ablation in sentences: what it can do here, what is ranked, and why the rest is not."""

from collections.abc import Sequence
from dataclasses import dataclass

from stdit_train.ablation.arms import loss_is_comparable
from stdit_train.ablation.results import HELD_OUT, LOSS, SEEN, Ranking, Result, rank
from stdit_train.ablation.runner import Ablation
from stdit_train.estimate.duration import duration

QUICK = "a quick look, not a ranking"
RANKING_SEEDS = 3  # the fewest that tell arms apart, as a rule
OTHER_LOSSES = "The arms' validation losses measure different things, so they are not ranked by them."


@dataclass(frozen=True)
class Comparison:
    """The rankings that the results allow, and a line for each that they do not."""

    rankings: list[Ranking]
    notes: list[str]


def compare(ablation: Ablation, results: Sequence[Result]) -> Comparison:
    """Rank the arms by validation loss, where that is comparable, and by the share of videos that are right.

    Arms with a run that diverged are left out: the seeds that remain would flatter them. Where no video of any run is
    right, training was too short to compare what the arms learn: they are not ranked by that, and by the loss only if
    it separates some of them.
    """
    ended = ablation.diverged()
    whole = [result for result in results if result.arm not in ended]
    measures = [LOSS] if loss_is_comparable(ablation.study.base, ablation.arms) else []
    rankings = [found for found in (rank(whole, measure) for measure in [*measures, SEEN, HELD_OUT]) if found]
    notes = [
        f"Not ranked: {arm}, which diverged in {len(seeds)} of {ablation.study.seeds} runs."
        for arm, seeds in ended.items()
    ]
    if not measures:
        notes.append(OTHER_LOSSES)
    scores = [scored["all"] for result in whole for scored in result.shares.values()]
    if scores and not any(scores):
        separated = [found for found in rankings if found.measure == LOSS and _separates(found)]
        notes.insert(0, _too_few_steps(ablation, whole, ranked=bool(separated)))
        rankings = separated
    return Comparison(rankings, notes)


def forecast(ablation: Ablation, quick: bool) -> list[str]:
    """Return lines on what is about to be trained: seconds a step as measured, runs, steps, and the time in all.

    Args:
        ablation: with its plan.
        quick: say how far the runs are from a ranking.
    """
    remaining, study = ablation.remaining(), ablation.study
    if not remaining:
        return []
    costs = ", ".join(f"{arm.name} {ablation.costs[arm.name].step:.3f}" for arm in ablation.arms)
    steps = _steps(ablation)
    lines = [f"seconds per step on this machine, measured in turns: {costs}"]
    lines += [f"{len(ablation.arms) * study.seeds} runs of {_range(steps)} steps: about {duration(remaining)} left"]
    if study.minutes and remaining > 60 * study.minutes:
        lines.append(
            f"that is more than the {study.minutes:g} minutes asked for, but {min(steps)} steps are the fewest of a "
            "run: choose fewer --variants or --prompts 0 to be done sooner"
        )
    if quick and min(steps) < study.base.steps:
        share = 100 * min(steps) / study.base.steps
        lines.append(
            f"{share:.2g}% of the {study.base.steps:,} steps of stage {study.base.stage}: this shows that all arms "
            f"train and what they cost. {_whole(ablation)}"
        )
    return lines


def time_taken(ablation: Ablation) -> str | None:
    """Return how long an ablation has taken and how long it was estimated to; None if that was not recorded."""
    estimated, seconds = ablation.estimated, ablation.seconds
    return f"{duration(seconds)} (estimated: {duration(estimated)})" if estimated and seconds else None


def _too_few_steps(ablation: Ablation, results: Sequence[Result], ranked: bool) -> str:
    videos = 2 * ablation.study.prompts * len(results)
    start = "Not ranked by videos" if ranked else "No ranking"
    return (
        f"{start}: after {_range([result.steps for result in results])} steps none of the {videos} scored videos shows "
        f"what its prompt says. That is too early to tell arms apart. {_whole(ablation)}"
    )


def _whole(ablation: Ablation) -> str:
    """How to get a ranking, and what it takes here."""
    study = ablation.study
    seeds, steps = max(study.seeds, RANKING_SEEDS), study.base.steps
    seconds = ablation.seconds_of({arm.name: steps for arm in ablation.arms}, seeds)
    takes = f", about {duration(seconds)} here" if seconds else ""
    return f"For a ranking: --seeds {seeds} --steps {steps} in another --out folder{takes}."


def _steps(ablation: Ablation) -> list[int]:
    return [ablation.config(arm, 0).steps for arm in ablation.arms]


def _range(steps: Sequence[int]) -> str:
    return f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"


def _separates(ranking: Ranking) -> bool:
    return any(difference.separated for difference in ranking.differences.values())
