"""Ctrl-C and SIGTERM: the first one ends a run after its current step, a later one immediately.

Those that arrive within a second are one: `uv run` and other launchers pass on the Ctrl-C that the terminal has sent to
all its processes, this one among them. Python handles a signal only when the main thread is back from what it calls,
which may be seconds later in a write to a disk; so a thread notes when they arrive.

A run that waits for a store of its data ends its waiting too.
"""

import logging
import signal
import socket
import time
from threading import Thread
from typing import Any, Self

from stdit_data.storage import readers

log = logging.getLogger(__name__)

SAME = 1.0  # seconds within which signals are one
NOTED = 0.05  # seconds that the thread is given to note one


class Interrupts:
    """A context in which the first SIGINT or SIGTERM is recorded, and a later one has its usual effect.

    Attributes:
        number: number of the signal that was received, None for none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        self._arrivals: list[float] = []

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)
        except ValueError:  # not in the main thread, where signals cannot be handled
            return self
        self._told, reader = socket.socketpair()
        self._told.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        Thread(target=self._note, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            self._told.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                if any(number in self._before for number in numbers):
                    self._arrivals.append(time.monotonic())

    def _stop(self, number: int, _frame: object) -> None:
        time.sleep(NOTED)
        if self.number is not None:
            if self._arrivals and self._arrivals[-1] - self._arrivals[0] >= SAME:
                signal.signal(number, self._before[number])
                signal.raise_signal(number)
            return
        self.number = number
        log.info("stopping after this step; press Ctrl-C again to stop immediately")
        # Ends the waiting for a store. In a thread, since the signal may have come while this one holds a lock of it.
        Thread(target=readers.release, daemon=True).start()
