"""Start the processes of a run on this machine with torch's elastic agent, as torchrun does.

A process that fails takes the others down: they get SIGTERM, and SIGKILL half a minute later.
"""

import logging
import os
import signal
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from stdit_train.errors import ConfigError

LAUNCHED = "STDIT_LAUNCHED"  # set for processes that `launch` starts, as opposed to torchrun


@dataclass(frozen=True)
class Ended:
    """How the processes ended.

    Attributes:
        code: exit code of the process that failed first; 0 without one.
        message: what that process could not report itself, as a line.
    """

    code: int
    message: str | None = None


def launch(count: int, command: Sequence[str]) -> Ended:
    """Run a command in several processes, with the environment variables that torchrun sets.

    SIGINT and SIGTERM are passed on to every process, each in a session of its own, so that a run ends after its step
    however long that takes.

    Args:
        count: number of processes.
        command: program and arguments.

    Raises:
        ConfigError: there are more processes than GPUs.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_gpus(count)
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # the failure is reported by `Ended`
    os.environ[LAUNCHED] = "1"
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
        signals_to_handle="SIGHUP",  # the agent would give the processes 30 s after SIGINT and SIGTERM
    )
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        _signal_children(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    program, *arguments = command
    try:
        elastic_launch(config, program)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _ended(rank, failure.exitcode, received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return Ended(0)


def _signal_children(number: int) -> None:
    import psutil

    children = psutil.Process().children()
    if not children:
        raise SystemExit(128 + number)
    for child in children:
        child.send_signal(number)


def _ended(rank: int, code: int, received: list[int]) -> Ended:
    if len(received) > 1 or -code in received:  # told to stop at once
        return Ended(128 + received[-1])
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return Ended(1, f"process {rank} was ended by {name}{hint}, and the others after it")
    return Ended(code)  # it has printed why


def check_gpus(processes: int) -> None:
    """Check that each process of this machine has a GPU of its own, where there are GPUs.

    Raises:
        ConfigError: there are fewer GPUs than processes.
    """
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise ConfigError(f"{processes} processes on a machine with {gpus} GPUs: use at most {gpus} (--nproc)")
