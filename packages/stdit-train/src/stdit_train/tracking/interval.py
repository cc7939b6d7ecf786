"""The values of the steps between two rows of metrics.jsonl, as one row."""

from collections.abc import Mapping
from typing import Any

COUNTS = ("skipped", "repeats")  # summed
RATES = ("samples_per_second", "tokens_per_second", "data_wait", "mfu")  # averaged over time
LATEST = ("lr_factor", "data_wait_rank")
LARGEST = ("memory_gib",)


class StepInterval:
    """Collects the values of steps: counts are summed, rates averaged over time, other values averaged over steps.

    Of the memory the row has the maximum, of the learning-rate factor the last value. A step without a value (a skipped
    one has no loss) does not count towards its average.
    """

    def __init__(self) -> None:
        self._means: dict[str, list[float]] = {}  # weighted sum, sum of weights
        self._values: dict[str, float] = {}

    def add(self, values: Mapping[str, float], seconds: float) -> None:
        """Add the values of a step that took so many seconds."""
        for name, value in values.items():
            if name in COUNTS:
                self._values[name] = self._values.get(name, 0.0) + value
            elif name in LATEST:
                self._values[name] = value
            elif name in LARGEST:
                self._values[name] = max(self._values.get(name, value), value)
            else:
                weight = seconds if name in RATES else 1.0
                total = self._means.setdefault(name, [0.0, 0.0])
                total[0] += weight * value
                total[1] += weight

    def take(self) -> dict[str, float]:
        """Return the row of the steps added so far, and begin a new one."""
        row = {name: total / weight for name, (total, weight) in self._means.items()} | self._values
        self._means, self._values = {}, {}
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return what was collected, as JSON values."""
        return {"means": {name: list(pair) for name, pair in self._means.items()}, "values": dict(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self._means = {name: list(pair) for name, pair in state["means"].items()}
        self._values = dict(state["values"])
