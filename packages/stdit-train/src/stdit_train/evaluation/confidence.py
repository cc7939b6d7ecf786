"""Means and shares with 95 % confidence intervals, and differences of paired runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    half: float | None  # half of the interval's width; None for a single value
    count: int

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half is None else self.mean + self.half

    @property
    def separated(self) -> bool:
        """Whether the interval excludes zero."""
        return self.half is not None and abs(self.mean) > self.half

    def text(self, digits: int = 4) -> str:
        """Format as "0.1234 ± 0.0012", or the mean alone without an interval."""
        shown = ".3g" if max(abs(self.mean), self.half or 0.0) >= 1e6 else f".{digits}f"
        return f"{self.mean:{shown}}" + ("" if self.half is None else f" ± {self.half:{shown}}")


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values with Student's 95 % interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values: expected at least one")
    count = len(values)
    if count < 2:
        return Interval(values[0], None, count)
    return Interval(mean(values), t_quantile(count - 1) * stdev(values) / math.sqrt(count), count)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Interval:
    """Return the mean of first - second over the seeds that both have, so that what a seed's runs share cancels.

    Raises:
        ValueError: no seed in common.
    """
    return mean_interval([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return t with P(|T| <= t) = confidence, for Student's distribution with `freedom` degrees of freedom."""
    low, high = 0.0, 1.0
    while _t_within(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < confidence else (low, middle)
    return high


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % confidence interval of the share right / total (Wilson 1927)."""
    share = right / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return 0.0 if right == 0 else center - half, 1.0 if right == total else center + half


def _t_within(t: float, freedom: int) -> float:
    """Return P(|T| <= t) by the finite series for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    total, term = 0.0, cosine if odd else 1.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
