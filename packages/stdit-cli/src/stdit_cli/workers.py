"""Where the commands of `stdit data` run: their options, processes or a Ray cluster, and what Ctrl-C leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from stdit_cli.console import INTERRUPTED

if TYPE_CHECKING:
    from stdit_data.workers.executors import Executor

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


def count_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_per_gpu() -> int:
    """Return the number of processes for a model: one per GPU, and one without GPUs."""
    import torch

    return max(1, torch.cuda.device_count())


@contextmanager
def interruptible(kept: str) -> Iterator[None]:
    """After Ctrl-C, say that nothing is lost.

    Args:
        kept: folder that holds what is finished.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped; finished shards are kept in {kept}; run the same command again to resume", err=True)
        raise typer.Exit(INTERRUPTED) from None
