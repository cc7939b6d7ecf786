"""The console: exit codes, signals, plain lines, and progress as a bar on a terminal or as lines elsewhere."""

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
SMOOTHING = 0.98  # share of a smoothed loss that a step keeps
RATE_SMOOTHING = 0.95
TOLD_FIRST = 10.0  # seconds until the first line where there is no terminal to draw a bar on
TOLD_EVERY = 60.0  # seconds between lines after that
RATE_STEPS = 500  # last steps that the time left is reckoned from: the first epoch may be slower than the others
WIDE = 100  # columns of a terminal from which on the bar is long


def plain_console() -> Console:
    """Make a console that prints lines unchanged: no markup, and no wrapping without a terminal."""
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


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """Let SIGTERM, which `timeout` and Slurm send, end the work like Ctrl-C, so that no file is left half written."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Lines:
    """Decides when the next line is due without a terminal: soon after the start, then once a minute."""

    def __init__(self) -> None:
        self._next = time.monotonic() + TOLD_FIRST

    def due(self) -> bool:
        """Return whether a line is due; if so, the next is a minute later."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + TOLD_EVERY
        return True


class TimeLeft(ProgressColumn):
    """A progress column with the time left, labelled."""

    max_refresh = 0.5  # seconds

    def render(self, task: Task) -> Text:
        """Show the time left, ? before the first step."""
        return Text(f"{clock(task.time_remaining)} left")


class CountingBar(Progress):
    """A bar that counts items, with the time left; in an output that is not a terminal, lines.

    Args:
        console: to draw on.
        unit: what is counted, in the plural.
        transient: whether the bar disappears at the end.
        disable: whether to show nothing at all, on ranks other than the first.
    """

    def __init__(self, console: Console, unit: str = "", *, transient: bool = True, disable: bool = False) -> None:
        texts = [TextColumn(unit, markup=False)] if unit else []
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *texts, TimeLeft()
        lines = not console.is_terminal
        super().__init__(*columns, console=console, transient=transient, disable=disable or lines)
        self.unit, self.lines = unit, Lines() if lines and not disable else None

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Advance a task, see rich."""
        super().update(task_id, **changes)
        task = self._tasks[task_id]
        if self.lines is not None and task.visible and task.total is not None and self.lines.due():
            count = f"{task.completed:.0f} of {task.total:.0f}"
            parts = (task.description, count, self.unit)
            line = f"{' '.join(part for part in parts if part)}, {clock(task.time_remaining)} left"
            self.console.print(line, markup=False, soft_wrap=True)


class TrainingBar:
    """A `Callback` that shows step, loss, speed, memory and the time left, below what stdit_train logs.

    Without a terminal it prints a line now and then, and one at the end.

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
            console=console,
            disable=not console.is_terminal,
        )
        self.lines = Lines()
        self.task: TaskID | None = None
        self.line = ""  # that was not printed yet

    def __enter__(self) -> "TrainingBar":
        self.bar.start()
        self.logs.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.logs.__exit__(None, None, None)
        self.bar.stop()
        self._print_line()

    def started(self, step: int, steps: int) -> None:
        """Show the bar."""
        self.task = self.bar.add_task("", total=1.0, count="", figures="")
        self.bar.update(self.task, completed=step / steps)
        self.steps, self.began = steps, time.monotonic()
        self.times: deque[tuple[float, float]] = deque(maxlen=RATE_STEPS)  # progress and time of the last steps
        self.smooth: dict[str, float] = {}

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        """Advance the bar to a step, `progress` of the way through the run; loss and rates are smoothed."""
        assert self.task is not None
        for name, value in values.items():
            keep = SMOOTHING if name == "loss" else RATE_SMOOTHING
            self.smooth[name] = keep * self.smooth.get(name, value) + (1 - keep) * value
        now = time.monotonic()
        self.times.append((progress, now))
        done = progress - self.times[0][0]
        left = (now - self.times[0][1]) * max(0.0, 1.0 - progress) / done if done > 0 else None
        elapsed = now - self.began
        by_time = progress > step / self.steps  # a budget of minutes that runs out before the steps do
        count = f"step {step}" if by_time else f"{step}/{self.steps}"
        beside = len("training  ") + self.bar_width + 2 * len(str(self.steps))
        shown = figures(self.smooth, left, elapsed, room=self.bar.console.width - beside)
        self.bar.update(self.task, completed=progress, count=count, figures=shown)
        if not self.bar.console.is_terminal:
            self.line = f"step {step}{'' if by_time else f' of {self.steps}'}: {figures(self.smooth, left, elapsed)}"
            if self.lines.due():
                self._print_line()

    def _print_line(self) -> None:
        if self.line:
            self.bar.console.print(self.line)
            self.line = ""


def figures(
    values: dict[str, Any], left: float | None, elapsed: float | None = None, room: float = float("inf")
) -> str:
    """Format the numbers beside the bar in at most `room` characters, leaving out the least important.

    Args:
        values: of a step, smoothed.
        left: seconds; None if not known.
        elapsed: seconds since the start; None to leave them out.
        room: characters.
    """
    parts = {"left": f"{clock(left)} left", "samples": f"{values['samples_per_second']:.1f} samples/s"}
    if "loss" in values:
        parts = {"loss": f"loss {values['loss']:.4f}"} | parts
    if "mfu" in values:
        parts["mfu"] = f"MFU {values['mfu']:.0%}"
    parts["memory"] = f"{values['memory_gib']:.1f} GiB"
    parts["data"] = f"data wait {values['data_wait']:.0%}"
    if elapsed is not None:
        parts["elapsed"] = f"{clock(elapsed)} elapsed"
    parts["tokens"] = f"{short(values['tokens_per_second'])} tokens/s"
    while len(parts) > 1 and len("  ".join(parts.values())) > room:
        parts.popitem()
    order = ("loss", "samples", "tokens", "mfu", "memory", "data", "elapsed", "left")
    return "  ".join(parts[name] for name in order if name in parts)


def short(number: float) -> str:
    """Format a number with a unit prefix: 1234 as 1.2k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def clock(seconds: float | None) -> str:
    """Format seconds as 1:02:03 or 4:05; ? if not known, and 0:00 for less than none."""
    if seconds is None:
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
