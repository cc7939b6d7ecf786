"""Record when, on what and with what a run was trained: a session per start or resumption, in its run.json."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit_train.checkpoint.run_folder import RunFolder
from stdit_train.hardware import describe_cpu
from stdit_train.versions import package_versions

if TYPE_CHECKING:
    import torch


class Session:
    """The time from a start or resumption of a run to its end.

    Args:
        run: folder of the run.
        device: of this process.
        processes: that train together.
        parallel: the parallel dimensions of several processes, by name.
    """

    def __init__(
        self, run: RunFolder, device: torch.device, processes: int, parallel: dict[str, int] | None = None
    ) -> None:
        self.run = run
        self.facts: dict[str, Any] = {
            "started": _now(),
            "command": command_line(),
            "machine": describe_machine(device, processes),
            **({} if parallel is None else {"parallel": parallel}),
            "versions": package_versions(),
        }
        self.save()

    def save(self) -> None:
        """Write the session to run.json, as lasting until now."""
        earlier = [facts for facts in read_sessions(self.run) if facts["started"] != self.facts["started"]]
        self.run.update_metadata(sessions=[*earlier, {**self.facts, "ended": _now()}])


def read_sessions(run: RunFolder) -> list[dict[str, Any]]:
    """Return the sessions of a run in order: started, ended (UTC, ISO 8601), command, machine, versions.

    Those on several processes have `parallel` too: world_size, replicate, sequence. Empty for a run of an older
    version.
    """
    sessions: list[dict[str, Any]] = run.metadata().get("sessions", [])
    return sessions


def command_line() -> str:
    """Return the command that started this process, as typed into a shell."""
    program = Path(sys.argv[0])
    name = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*name, *sys.argv[1:]])


def describe_machine(device: torch.device, processes: int) -> str:
    """Return device, system and number of processes in words."""
    if device.type == "cuda":
        import torch

        name = f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    elif device.type == "mps":
        name = "Apple GPU (MPS)"
    else:
        name = describe_cpu()
    shared = f"{processes} processes, each on " if processes > 1 else ""
    return f"{shared}{name}, {platform.system()} {platform.machine()}"


def _now() -> str:
    return datetime.now(UTC).isoformat()
