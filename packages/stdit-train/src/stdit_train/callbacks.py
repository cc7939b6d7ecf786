"""Callbacks of a training run, and its outcome."""

from dataclasses import dataclass
from typing import Protocol


class Callback(Protocol):
    """Called as a run proceeds, on rank 0; messages for people go to `logging` instead."""

    def started(self, step: int, steps: int) -> None:
        """Called when training begins after `step` of `steps` steps."""

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        """Called after each step.

        Args:
            step: steps done.
            progress: share of the run that is done, 0..1.
            values: metrics of the step; a skipped step has no loss.
        """


class NullCallback:
    """A callback that does nothing."""

    def started(self, step: int, steps: int) -> None:
        """Do nothing."""

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        step: steps done.
        finished: whether it reached its last step; False after an interruption.
        values: metrics of the last step.
        signal: number of the signal that interrupted it, None for none; a finished run may have received one in its
            last step or while the result was written.
        prompts: captions of the data set that were sampled during training.
    """

    step: int
    finished: bool
    values: dict[str, float]
    signal: int | None = None
    prompts: tuple[str, ...] = ()

    @property
    def interrupted(self) -> bool:
        """Whether a signal came: no other run is to be begun."""
        return not self.finished or self.signal is not None
