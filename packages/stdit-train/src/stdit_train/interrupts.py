"""Ctrl-C and SIGTERM: the first one ends a run after its current step, a later one immediately.

Those that come within a second are one: `uv run` and other launchers pass on the Ctrl-C that the terminal has sent to
all its processes, this one among them.

A run that waits for a store of its data ends its waiting too.
"""

import logging
import signal
import time
from threading import Thread
from typing import Any, Self

from stdit_data.storage import readers

log = logging.getLogger(__name__)

SAME = 1.0  # seconds within which signals are one


class Interrupts:
    """A context in which the first SIGINT or SIGTERM is recorded, and a later one has its usual effect.

    Attributes:
        number: number of the signal that was received, None for none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        self._first = 0.0

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)
        except ValueError:  # not in the main thread, where signals cannot be handled
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame: object) -> None:
        if self.number is not None:
            if time.monotonic() - self._first >= SAME:
                signal.signal(number, self._before[number])
                signal.raise_signal(number)
            return
        self.number, self._first = number, time.monotonic()
        log.info("stopping after this step; press Ctrl-C again to stop immediately")
        # Ends the waiting for a store. In a thread, since the signal may have come while this one holds a lock of it.
        Thread(target=readers.release, daemon=True).start()
