"""Where the commands of `stdit data` run: their options, processes or a Ray cluster, and what is left at Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from stdit_cli.console import INTERRUPTED, ended_by_signal

if TYPE_CHECKING:
    from stdit_data.workers.executors import Executor

Processes = Annotated[
    int | None, typer.Option(min=1, help="Processes, or workers of the Ray cluster.", show_default="one per CPU")
]
ModelProcesses = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes, each with the models, or workers of the Ray cluster.",
        show_default="one per GPU, at least 1",
    ),
]
RenamedThreads = Annotated[int | None, typer.Option("--workers", min=1, hidden=True)]
Ray = Annotated[
    str | None, typer.Option(help="Run on a Ray cluster: its address, `auto`, or `local` to start one here.")
]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs per Ray worker.")]


def make_executor(width: int | None, ray: str | None) -> Executor:
    """Return where shards run.

    Args:
        width: number of processes, or of workers of the cluster; by default one per CPU, or as many as fit.
        ray: address of a Ray cluster.
    """
    from stdit_data.workers.executors import Inline, Processes, RayCluster

    if ray is not None:
        return RayCluster(ray, width)
    width = width or count_cpus()
    return Inline() if width == 1 else Processes(width)


def find_threads(threads: int | None, workers: int | None) -> int | None:
    """Return the number of threads that read files: --threads, or --workers, which was its name until 0.2."""
    if workers is None:
        return threads
    typer.echo("stdit: --workers is deprecated: use --threads", err=True)
    return workers


def count_cpus() -> int:
    """Return the number of CPUs for this process; those of torchrun on one machine share its CPUs."""
    import os

    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, found // int(sharing)) if sharing.isdecimal() and int(sharing) else found


def one_per_gpu() -> int:
    """Return the number of processes for a model: one per GPU, and one without GPUs."""
    import torch

    return max(1, torch.cuda.device_count())


@contextmanager
def interruptible(kept: str) -> Iterator[None]:
    """End at SIGTERM as at Ctrl-C, and say that nothing is lost.

    Args:
        kept: folder that holds what is finished.
    """
    try:
        with ended_by_signal():
            yield
    except KeyboardInterrupt:
        typer.echo(f"stopped; finished shards are kept in {kept}; run the same command again to resume", err=True)
        raise typer.Exit(INTERRUPTED) from None
