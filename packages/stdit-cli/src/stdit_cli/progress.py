"""The progress bar of a training run: a `Watcher`."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

SMOOTHING = 0.98  # share of a smoothed loss that a step keeps
RATE_SMOOTHING = 0.95


class TrainingBar:
    """Step, loss, speed, memory and the time that is left."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.quiet = quiet  # no lines above the bar
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> "TrainingBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def started(self, step: int, steps: int) -> None:
        """Show the bar."""
        self.task = self.bar.add_task("", total=steps, completed=step, figures="")
        self.first: tuple[float, float] | None = None  # progress and time of the first step
        self.smooth: dict[str, float] = {}

    def stepped(self, step: int, progress: float, values: dict[str, float]) -> None:
        """Move the bar; loss and rates are smoothed."""
        assert self.task is not None
        for name, value in values.items():
            keep = SMOOTHING if name == "loss" else RATE_SMOOTHING
            self.smooth[name] = keep * self.smooth.get(name, value) + (1 - keep) * value
        elapsed = self.bar.tasks[0].elapsed or 0.0
        if self.first is None:
            self.first = progress, elapsed
        done = progress - self.first[0]
        left = (elapsed - self.first[1]) * (1.0 - progress) / done if done > 0 else None
        self.bar.update(self.task, completed=step, figures=figures(self.smooth, left))

    def said(self, line: str) -> None:
        """A line above the bar."""
        if self.quiet:
            return
        self.bar.console.print(line)


def figures(values: dict[str, Any], left: float | None) -> str:
    """What stands beside the bar."""
    parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    parts.append(f"{values['samples_per_second']:.1f} samples/s")
    parts.append(f"{short(values['tokens_per_second'])} tokens/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    parts.append(f"{values['memory_gib']:.1f} GiB")
    parts.append(f"data {values['data_wait']:.0%}")
    return "  ".join([*parts, f"{clock(left)} left"])


def short(number: float) -> str:
    """1234 as 1.2k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def clock(seconds: float | None) -> str:
    """1:02:03, 4:05, or ? when it isn't known."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
