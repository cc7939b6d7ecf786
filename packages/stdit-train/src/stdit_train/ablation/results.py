"""Results of an ablation's runs, the ranking of its arms, and the tables of both as CSV."""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

from stdit_train.ablation.arms import estimate_arm
from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.config.load import read_settings
from stdit_train.config.schema import TrainConfig
from stdit_train.errors import ConfigError
from stdit_train.evaluation.confidence import Interval, mean_interval, paired_difference
from stdit_train.tracking.metrics import read_metrics

SCORES = "scores.json"
LOSS, SEEN, HELD_OUT = "validation loss", "seen", "held-out"
ASPECTS = ("all", "colour", "shape", "motion")


@dataclass(frozen=True)
class Result:
    """Result of one finished run."""

    arm: str
    seed: int
    steps: int
    parameters: int
    same_start: float  # share of the parameters with the initial values of the reference arm's
    step_flops: int
    seconds_per_step: float
    step_memory: int  # bytes, estimated: weights, gradients, optimizer, EMA, activations
    process_memory: float  # GiB, measured peak: of the GPU, or of the process with the runs before this one
    validation_loss: float | None
    curve: list[tuple[int, float]]  # (step, validation loss)
    shares: dict[str, dict[str, float]]  # share of videos that are right, by split and aspect

    def measure(self, name: str) -> float | None:
        """Return the validation loss, or a split's share of videos that are correct in every aspect."""
        if name == LOSS:
            return self.validation_loss
        return self.shares[name]["all"] if name in self.shares else None


def read_result(run: RunFolder, config: TrainConfig, arm: str, step_seconds: float | None = None) -> Result:
    """Read the result of a finished run.

    Args:
        run: folder of the run.
        config: its settings.
        arm: name of its arm.
        step_seconds: seconds per step as measured in turns with the other arms. [default: the median over the logged
            steps, in which whatever else the machine did shows]

    Raises:
        ConfigError: a file of the run is missing or damaged.
    """
    rows = read_metrics(run.metrics_file)
    curve = [(int(row["step"]), row["validation_loss"]) for row in rows if "validation_loss" in row]
    rates = [row["samples_per_second"] for row in rows if "samples_per_second" in row]
    if not rates:
        raise ConfigError(f"{run.metrics_file} has no step: remove {run.path} to train this run again")
    estimate = estimate_arm(config)
    kept = [size for part, size in estimate.memory.items() if part != "VAE and text encoder"]
    shares = {}
    if (run.path / SCORES).is_file():
        scores = read_settings(run.path / SCORES)["scores"]
        shares = {split: {aspect: scores[split][aspect]["share"] for aspect in scores[split]} for split in scores}
    return Result(
        arm=arm,
        seed=config.seed,
        steps=run.metadata().get("finished_at_step", config.steps),
        parameters=estimate.parameters,
        same_start=run.metadata().get("same_start", 1.0),
        step_flops=estimate.step_flops,
        seconds_per_step=step_seconds or config.global_batch / statistics.median(rates),
        step_memory=sum(kept),
        process_memory=max(row.get("memory_gib", 0.0) for row in rows),
        validation_loss=curve[-1][1] if curve else None,
        curve=curve,
        shares=shares,
    )


def by_arm(results: Sequence[Result], measure: str) -> dict[str, dict[int, float]]:
    """Return a measure of the runs by arm and seed; arms without it are left out."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        value = result.measure(measure)
        if value is not None:
            found.setdefault(result.arm, {})[result.seed] = value
    return found


@dataclass(frozen=True)
class Ranking:
    """Arms ordered by a measure, best first, and their paired differences."""

    measure: str
    means: dict[str, Interval]  # best first
    differences: dict[tuple[str, str], Interval]  # better arm minus worse one, paired by seed

    @property
    def line(self) -> str:
        """Return the order in one line, as in "dit > seq ~ parallel": ">" where neighbours are separated, "~"
        elsewhere.
        """
        names = list(self.means)
        signs = [" > " if self.differences[pair].separated else " ~ " for pair in pairwise(names)]
        return "".join(name + sign for name, sign in zip(names, [*signs, ""], strict=True))

    @property
    def not_separated(self) -> list[tuple[str, str]]:
        """Return pairs of arms whose paired difference has zero in its interval, or no interval (one seed)."""
        return [pair for pair, difference in self.differences.items() if not difference.separated]


def separation(ranking: Ranking) -> str:
    """Describe in a sentence which pairs of arms are not separated."""
    if len(ranking.means) < 2:
        return "One arm: nothing to compare"
    if min(interval.count for interval in ranking.means.values()) < 2:
        return "One seed gives no interval, so no pair is separated"
    apart = ", ".join(f"{a} and {b}" for a, b in ranking.not_separated)
    return f"Not separated: {apart}" if apart else "All pairs are separated"


def rank(results: Sequence[Result], measure: str) -> Ranking | None:
    """Order the arms by a measure, over the seeds that all of them have finished; None without such a seed."""
    values = by_arm(results, measure)
    if not values:
        return None
    common = set.intersection(*(set(runs) for runs in values.values()))
    if not common:
        return None
    values = {arm: {seed: runs[seed] for seed in sorted(common)} for arm, runs in values.items()}
    means = {arm: mean_interval(list(runs.values())) for arm, runs in values.items()}
    order = sorted(means, key=lambda arm: means[arm].mean * (1 if measure == LOSS else -1))
    differences = {(a, b): paired_difference(values[a], values[b]) for a, b in combinations(order, 2)}
    return Ranking(measure, {arm: means[arm] for arm in order}, differences)


def write_csv(results: Sequence[Result], file: Path) -> None:
    """Write a CSV with a line per run."""
    columns = ["arm", "seed", "steps", "parameters", "same_start", "flops_per_step", "seconds_per_step"]
    columns += ["step_memory_bytes", "process_memory_gib", "validation_loss"]
    columns += [f"{split}_{aspect}" for split in (SEEN, HELD_OUT) for aspect in ASPECTS]
    with file.open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(columns)
        for r in results:
            row = [r.arm, r.seed, r.steps, r.parameters, r.same_start, r.step_flops, f"{r.seconds_per_step:.4f}"]
            row += [r.step_memory, f"{r.process_memory:.2f}"]
            row += ["" if r.validation_loss is None else f"{r.validation_loss:.6f}"]
            row += [r.shares.get(split, {}).get(aspect, "") for split in (SEEN, HELD_OUT) for aspect in ASPECTS]
            writer.writerow(row)


def write_differences(rankings: Sequence[Ranking], file: Path) -> None:
    """Write a CSV with a line per pair of arms and measure: the paired difference and its 95 % interval."""
    with file.open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(["measure", "better", "worse", "difference", "low", "high", "seeds", "separated"])
        for ranking in rankings:
            for (better, worse), found in ranking.differences.items():
                ends = ["" if end is None else f"{end:.6f}" for end in (found.low, found.high)]
                row = [ranking.measure, better, worse, f"{found.mean:.6f}", *ends, found.count]
                writer.writerow([*row, "yes" if found.separated else "no"])
