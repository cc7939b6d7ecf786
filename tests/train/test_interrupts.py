"""Signals that end a run after its step, or at once."""

import os
import signal

import pytest

from stdit_train import interrupts
from stdit_train.interrupts import Interrupts


def test_signals_at_the_same_time_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`uv run` sends a Ctrl-C that the terminal has sent already."""
    clock = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[0])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with Interrupts() as received:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert received.number == signal.SIGINT
        clock[0] += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler
