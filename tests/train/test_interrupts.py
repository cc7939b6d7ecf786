"""Signals that end a run after its step, or at once."""

import os
import signal
import subprocess
import sys
import time
from hashlib import pbkdf2_hmac

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


def test_signals_that_arrive_together_are_one_whenever_they_are_handled() -> None:
    """The second arrives in a call that does not come back to Python for longer than signals may lie apart."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.perf_counter()
    pbkdf2_hmac("sha256", b"", b"", 100_000)
    rounds = int(100_000 * 1.6 / (time.perf_counter() - started))
    sender = f"import os, signal, time; time.sleep(0.2); os.kill({os.getpid()}, signal.SIGINT)"
    with Interrupts() as received:
        os.kill(os.getpid(), signal.SIGINT)
        with subprocess.Popen([sys.executable, "-S", "-c", sender]):
            pbkdf2_hmac("sha256", b"", b"", rounds)  # one call, in which other threads run and no signal is handled
        assert received.number == signal.SIGINT
    signal.signal(signal.SIGINT, before)
