"""Print the learning rate with the lowest validation loss averaged over the variants of a sweep.

uv run python benchmarks/ablation/best_rate.py runs/ranking/sweep/runs.csv
"""

import csv
import sys
from pathlib import Path
from statistics import mean


def best_rate(file: Path) -> str:
    """Of arms named VARIANT-lr=RATE; every rate must have been run with every variant."""
    losses: dict[str, dict[str, float]] = {}
    with file.open() as source:
        for row in csv.DictReader(source):
            variant, _, rate = row["arm"].partition("-lr=")
            losses.setdefault(rate, {})[variant] = float(row["validation_loss"])
    variants = {frozenset(found) for found in losses.values()}
    if len(variants) != 1:
        raise SystemExit(f"{file}: not every rate was run with every variant; let the sweep finish")
    return min(losses, key=lambda rate: mean(losses[rate].values()))


if __name__ == "__main__":
    print(best_rate(Path(sys.argv[1])))
