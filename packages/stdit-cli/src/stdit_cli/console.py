"""The console: exit codes, plain lines, and the progress bar of a training run."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
SMOOTHING = 0.98  # share of a smoothed loss that a step keeps
RATE_SMOOTHING = 0.95
TOLD_EVERY = 60.0  # seconds between lines where there is no terminal to draw a bar on
WIDE = 100  # columns of a terminal from which on the bar is long


def plain_console() -> Console:
    """Make a console that prints lines as they are: no markup, and no wrapping where there is no terminal."""
    console = Console(highlight=False, markup=False)
    console.soft_wrap = not console.is_terminal
    return console


class LogLines(logging.Handler):
    """Passes the message of each log record to a function, as a line.

    Args:
        write: called with each line.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record's message."""
        self.write(record.getMessage())


@contextmanager
def shown_logs(name: str, write: Callable[[str], None]) -> Iterator[None]:
    """Write what a logger and those below it log, of level INFO and above, as lines."""
    logger, handler = logging.getLogger(name), LogLines(write)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class TrainingBar:
    """A `Callback` that shows step, loss, speed, memory and the time that is left, below what stdit_train logs.

    Without a terminal it prints a line a minute instead.

    Args:
        console: to draw on.
        quiet: do not print log lines above the bar.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.logs = shown_logs("stdit_train", (lambda line: None) if quiet else console.print)
        self.bar_width = 20 if console.width >= WIDE else 10
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=self.bar_width),
            TextColumn("{task.fields[count]} {task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            console=console,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> "TrainingBar":
        self.bar.start()
        self.logs.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.logs.__exit__(None, None, None)
        self.bar.stop()

    def started(self, step: int, steps: int) -> None:
        """Show the bar."""
        self.task = self.bar.add_task("", total=1.0, count="", figures="")
        self.bar.update(self.task, completed=step / steps)
        self.steps, self.told = steps, time.monotonic()
        self.first: tuple[float, float] | None = None  # progress and time of the first step
        self.smooth: dict[str, float] = {}

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        """Advance the bar to a step, `progress` of the way through the run; loss and rates are smoothed."""
        assert self.task is not None
        for name, value in values.items():
            keep = SMOOTHING if name == "loss" else RATE_SMOOTHING
            self.smooth[name] = keep * self.smooth.get(name, value) + (1 - keep) * value
        elapsed = self.bar.tasks[0].elapsed or 0.0
        if self.first is None:
            self.first = progress, elapsed
        done = progress - self.first[0]
        left = (elapsed - self.first[1]) * (1.0 - progress) / done if done > 0 else None
        by_time = progress > step / self.steps  # a budget of minutes that runs out before the steps do
        count = f"step {step}" if by_time else f"{step}/{self.steps}"
        beside = len("training  / 00:00:00  ") + self.bar_width + 2 * len(str(self.steps))
        shown = figures(self.smooth, left, self.bar.console.width - beside)
        self.bar.update(self.task, completed=progress, count=count, figures=shown)
        if not self.bar.console.is_terminal and time.monotonic() - self.told >= TOLD_EVERY:
            self.told = time.monotonic()
            self.bar.console.print(f"step {step}{'' if by_time else f' of {self.steps}'}: {figures(self.smooth, left)}")


def figures(values: dict[str, Any], left: float | None, room: float = float("inf")) -> str:
    """Format the numbers beside the bar in at most `room` characters, leaving out the least important.

    Args:
        values: of a step, smoothed.
        left: seconds; None if not known.
        room: characters.
    """
    parts = {"left": f"{clock(left)} left", "samples": f"{values['samples_per_second']:.1f} samples/s"}
    if "loss" in values:
        parts = {"loss": f"loss {values['loss']:.4f}"} | parts
    if "mfu" in values:
        parts["mfu"] = f"MFU {values['mfu']:.0%}"
    parts["memory"] = f"{values['memory_gib']:.1f} GiB"
    parts["data"] = f"data {values['data_wait']:.0%}"
    parts["tokens"] = f"{short(values['tokens_per_second'])} tokens/s"
    while len(parts) > 1 and len("  ".join(parts.values())) > room:
        parts.popitem()
    order = ("loss", "samples", "tokens", "mfu", "memory", "data", "left")
    return "  ".join(parts[name] for name in order if name in parts)


def short(number: float) -> str:
    """Format a number with a unit prefix: 1234 as 1.2k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def clock(seconds: float | None) -> str:
    """Format seconds as 1:02:03 or 4:05; ? if not known."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
