"""What is told along a run, and what comes back at its end."""

from dataclasses import dataclass
from typing import Protocol


class Callback(Protocol):
    """Who is told how the run goes (the CLI's progress bar)."""

    def started(self, step: int, steps: int) -> None:
        """Training begins after `step` of `steps` steps."""

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        """A step is done; `progress` is the share of the run, 0..1. A skipped step has no loss."""

    def said(self, line: str) -> None:
        """Something worth a line."""


class NullCallback:
    """Nobody is told."""

    def started(self, step: int, steps: int) -> None:
        """Nothing."""

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        """Nothing."""

    def said(self, line: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    finished: bool  # False when it was interrupted
    values: dict[str, float]  # the last metrics
    signal: int | None = None  # what interrupted it
