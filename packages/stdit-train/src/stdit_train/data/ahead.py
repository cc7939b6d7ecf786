"""Fetch the batches of a step while the processes of a run still have to agree on the step before."""

import time

from stdit_data.errors import DataError
from stdit_data.loading.loader import Batch, ClipLoader


class NextStep:
    """The next step of a loader.

    Args:
        loader: its iteration begins here.

    Attributes:
        batches: micro-batches of the step; none if they cannot be read.
        failure: why they cannot be read.
    """

    def __init__(self, loader: ClipLoader) -> None:
        self.batches: list[Batch] = []
        self.failure: DataError | None = None
        self._steps = iter(loader)

    def fetch(self) -> float:
        """Fetch the step and return the seconds spent waiting for it."""
        started = time.perf_counter()
        self.batches, self.failure = [], None
        try:
            self.batches = next(self._steps)
        except DataError as error:
            self.failure = error
        return time.perf_counter() - started
