"""Trace a few steps with torch.profiler, for chrome://tracing or https://ui.perfetto.dev."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 2  # steps before the trace begins


class Profile:
    """A context in which a few steps are traced into `folder`/trace-RANK.json.

    Args:
        folder: folder for the trace; created when it is written.
        steps: number of steps to trace; 0 for none.
        process: rank of this process.
        guard: called with the function that writes the trace. [default: an error is raised]
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        process: int = 0,
        guard: Callable[[Callable[[], None]], object] = lambda write: write(),
    ) -> None:
        self.file = folder / f"trace-{process}.json"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        plan = schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1) if steps else None
        self._profiler: Any = plan and profile(
            activities=activities,
            schedule=plan,
            on_trace_ready=lambda p: guard(partial(self._write, p)),
            record_shapes=True,
        )

    def __enter__(self) -> Self:
        if self._profiler:
            self._profiler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._profiler:
            self._profiler.__exit__(*error)

    def step(self) -> None:
        """Record the end of a step."""
        if self._profiler:
            self._profiler.step()

    def _write(self, profiler: Any) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.file))
