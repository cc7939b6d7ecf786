"""Ctrl-C and SIGTERM: the first ends a run after its current step, the second at once."""

import signal
from collections.abc import Callable
from typing import Any, Self


class Interrupts:
    """While entered, remembers the first signal that asks the run to end.

    Args:
        said: told that the run is about to stop.
    """

    def __init__(self, said: Callable[[str], None]) -> None:
        self.said = said
        self.number: int | None = None  # of the signal that came
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame: object) -> None:
        self.number = number
        self.said("stopping after this step; once more to stop at once")
        signal.signal(number, self._before[number])
