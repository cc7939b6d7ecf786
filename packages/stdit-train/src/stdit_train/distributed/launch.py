"""Starts a run's processes on this machine, with what torchrun starts them with: torch's elastic agent.

A process that fails takes the others down: they are asked to end, and after half a minute made to.
"""

import logging
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stdit_train.distributed._distributed import PeerFailed, check_devices

PATIENCE = 10.0  # seconds that a process with nothing to say leaves to the one that failed


@dataclass(frozen=True)
class Ended:
    """How the processes ended."""

    code: int  # to exit with: that of the process that failed first
    said: str | None  # what that process could not say itself


def launch(count: int, work: Callable[..., None], *arguments: Any) -> Ended:
    """Run `work(*arguments)` in processes of their own, with the variables that torchrun sets.

    Args:
        count: of the processes.
        work: a function of a module; what it raises ends all of them, a SystemExit with its code.
        arguments: of `work`.

    Raises:
        ConfigError: more processes than GPUs.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_devices(count)
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # we say ourselves who failed
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGHUP",  # the others are passed on: a run stops after its step, however long that takes
    )
    passed_on: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        passed_on.append(number)
        _pass_on(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        elastic_launch(config, _work)(work, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _ended(rank, failure, passed_on)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Ended(0, None)


def _work(work: Callable[..., None], *arguments: Any) -> None:
    os.setsid()  # Ctrl-C reaches the launcher alone, which passes it on once
    try:
        work(*arguments)
    except PeerFailed:
        time.sleep(PATIENCE)
        raise


def _pass_on(number: int) -> None:
    children = multiprocessing.active_children()
    if not children:
        raise SystemExit(128 + number)
    for child in children:
        if child.pid is not None:
            os.kill(child.pid, number)


def _ended(rank: int, failure: Any, passed_on: list[int]) -> Ended:
    if len(passed_on) > 1 or -failure.exitcode in passed_on:  # told to stop at once, wherever they were
        return Ended(128 + passed_on[-1], None)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return Ended(1, f"process {rank} was ended by {name}{hint}, and the others after it")
    details = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    if not isinstance(details, dict):
        return Ended(failure.exitcode, None)  # it has said why
    trace = details.get("extraInfo", {}).get("py_callstack", "")
    return Ended(failure.exitcode, f"process {rank} failed: {details.get('message')}\n{trace}".rstrip())
