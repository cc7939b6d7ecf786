"""Explain the share of a run's time that is spent waiting for data."""

import logging
import math

from stdit_data.clip import ClipDataset
from stdit_data.latents.memory import InMemoryLatents
from stdit_train.config.schema import TrainConfig

STEPS = 50  # that the share is taken over; the first are slower than the others
HIGH = 0.3  # share that is worth a line

log = logging.getLogger(__name__)


class DataWait:
    """Logs where the waiting comes from: at the start for clips that are encoded on first use, else once it is high.

    Args:
        dataset: what the loader reads.
        config: settings of the run.
    """

    def __init__(self, dataset: ClipDataset, config: TrainConfig) -> None:
        self.workers = config.data.workers
        self._encoded = getattr(dataset, "moments", False)
        self._seconds = self._waited = 0.0
        self._steps = 0
        if isinstance(dataset, InMemoryLatents):
            self._steps = STEPS  # nothing more to say
            log.info(
                "each clip is encoded on first use and kept in memory: until all are, for %d steps, most of "
                "the time is spent waiting for data; later steps are faster",
                math.ceil(len(dataset) / config.global_batch),
            )

    def add(self, seconds: float, waited: float) -> None:
        """Add the duration of a step and how much of it was spent waiting for data."""
        if self._steps == STEPS:
            return
        self._steps += 1
        self._seconds += seconds
        self._waited += waited
        if self._steps == STEPS and self._waited > HIGH * self._seconds:
            cache = "" if self._encoded else ", or encode the clips once with `stdit data encode` and train on that"
            log.info(
                "%.0f %% of the time is spent waiting for data: read ahead with more threads, --set data.workers=%d%s",
                100 * self._waited / self._seconds,
                2 * max(self.workers, 1),
                cache,
            )
