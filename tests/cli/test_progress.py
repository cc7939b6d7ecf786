"""Progress: bars on a terminal, lines in a file; what they say is true."""

import io
import logging
import re

import pytest
from rich.console import Console

from stdit_cli import console as progress
from stdit_cli.console import CountingBar, TrainingBar, clock, figures, plain_console

VALUES = {
    "loss": 0.5, "samples_per_second": 2000.0, "tokens_per_second": 81920.0, "memory_gib": 61.2, "data_wait": 0.03,
}  # fmt: skip


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def terminal() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=80, force_terminal=True, color_system=None, legacy_windows=False), out


def file() -> tuple[Console, io.StringIO]:
    out, console = io.StringIO(), plain_console()
    console.file, console.width = out, 20
    return console, out


def drawn(out: io.StringIO) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", out.getvalue()).split())


def test_what_stands_beside_the_bar() -> None:
    values = {**VALUES, "samples_per_second": 2.0, "mfu": 0.414}
    assert figures(values, 3725.0, 65.0) == (
        "loss 0.5000  2.0 samples/s  81.9k tokens/s  MFU 41%  61.2 GiB  data wait 3%  1:05 elapsed  1:02:05 left"
    )
    assert figures(values, 3725.0, room=42) == "loss 0.5000  2.0 samples/s  1:02:05 left"
    assert figures(values, 3725.0, room=5) == "loss 0.5000"
    assert (clock(-1.2), clock(None)) == ("0:00", "?")


def test_a_bar_fits_a_narrow_terminal_and_its_clock_is_labelled(time: Clock) -> None:
    console, out = terminal()
    with TrainingBar(console) as bar:
        bar.started(0, 30_000)
        bar.stepped(12_345, 0.4, VALUES)
    assert drawn(out).endswith("12345/30000 loss 0.5000 2000.0 samples/s 61.2 GiB ? left")
    with TrainingBar(console) as bar:
        bar.started(0, 1_000_000)
        bar.stepped(70, 0.5, VALUES)  # half of its minutes, not of its steps
    assert " step 70 loss 0.5000" in drawn(out)


def test_no_time_is_left_after_the_end(time: Clock) -> None:
    console, out = terminal()
    with TrainingBar(console) as bar:
        bar.started(0, 1_000_000)
        for step, progress_so_far in enumerate((0.5, 0.9, 1.2), 1):  # a step that took longer than the minutes left
            bar.stepped(step, progress_so_far, VALUES)
            time.now += 10
    assert drawn(out).endswith("0:00 left")
    assert "-" not in drawn(out)


def test_the_time_left_follows_the_last_steps(time: Clock) -> None:
    """The first epoch encodes: what it took says nothing of the steps after it."""
    console, out = file()
    with TrainingBar(console) as bar:
        bar.started(0, 4000)
        for step in range(1, 2001):
            time.now += 1.0 if step <= 400 else 0.25
            bar.stepped(step, step / 4000, VALUES)
    assert out.getvalue().splitlines()[-1].endswith("13:20 elapsed  8:20 left")


def test_a_file_gets_whole_lines_now_and_then(time: Clock) -> None:
    console, out = file()
    with TrainingBar(console) as bar:
        bar.started(0, 100)
        logging.getLogger("stdit_train.trainer").info("samples in runs/[b]a folder/of a long name")
        for step in range(1, 101):
            time.now += 1
            bar.stepped(step, step / 100, VALUES)
    rest = "loss 0.5000  2000.0 samples/s  81.9k tokens/s  61.2 GiB  data wait 3%"
    assert out.getvalue().splitlines() == [
        "samples in runs/[b]a folder/of a long name",
        f"step 10 of 100: {rest}  0:10 elapsed  1:30 left",
        f"step 70 of 100: {rest}  1:10 elapsed  0:30 left",
        f"step 100 of 100: {rest}  1:40 elapsed  0:00 left",
    ]


def test_things_that_are_counted(time: Clock) -> None:
    console, out = file()
    with CountingBar(console, "clips") as bar:
        task = bar.add_task("encoding", total=200)
        for done in range(1, 201):
            time.now += 0.5
            bar.update(task, completed=done)
    lines = out.getvalue().splitlines()
    assert [line.rpartition(", ")[0] for line in lines] == [
        "encoding 20 of 200 clips",
        "encoding 140 of 200 clips",
    ]
    assert all(line.endswith(" left") for line in lines)
    console, out = file()
    with CountingBar(console, disable=True) as bar:
        time.now += 100
        bar.update(bar.add_task("sampling", total=2), completed=1)
    assert not out.getvalue()
    console, out = terminal()
    with CountingBar(console, "steps", transient=False) as bar:
        bar.update(bar.add_task("sampling", total=2), completed=2)
    assert drawn(out).endswith("2/2 steps 0:00 left")
