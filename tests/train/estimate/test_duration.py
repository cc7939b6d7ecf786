"""How long something takes, in words; and a rate that other work on the machine does not change."""

import threading

import pytest
import torch

from stdit_train.estimate.duration import duration
from stdit_train.hardware import measured_peak


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0123, "0.012 seconds"),
        (9.4, "9.4 seconds"),
        (9.6, "10 seconds"),
        (40, "40 seconds"),
        (168, "2.8 minutes"),
        (5399, "90.0 minutes"),
        (11_160, "3.1 hours"),
        (12 * 86_400, "12 days"),
        (6.16e10, "1,952 years"),
    ],
)
def test_the_unit_fits(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_peak_is_the_same_beside_other_work() -> None:
    threads = torch.get_num_threads()
    alone = measured_peak()
    stop = threading.Event()

    def work() -> None:
        a = torch.randn(512, 512)
        while not stop.is_set():
            a @ a

    others = [threading.Thread(target=work) for _ in range(4)]
    for other in others:
        other.start()
    try:
        beside = measured_peak()
    finally:
        stop.set()
        for other in others:
            other.join()
    assert torch.get_num_threads() == threads
    assert beside > alone / 3  # by the clock it would be a fifth on one core, and less
