"""Keep a second command out of a run's folder."""

import json
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from stdit_data.storage.atomic import replace_text
from stdit_model.errors import reason
from stdit_train.errors import ConfigError

LOCK, HOLDER = "run.lock", "run.lock.json"

_held: set[Path] = set()  # folders of this process


class FolderInUseError(ConfigError):
    """Another process holds the folder."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder, which is created if it does not exist; a process may hold one several times.

    The lock ends with the process, however that ends. `run.lock.json` names the holder: host, pid, and when it began;
    its token differs each time.

    Raises:
        FolderInUseError: another process holds it.
        ConfigError: it cannot be created or written to.
    """
    key = folder.resolve()
    if key in _held:
        yield
        return
    created = [path for path in (key, *key.parents) if not path.exists()]
    lock = FileLock(key / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUseError(
            f"{folder} is in use by {describe_holder(folder)}: wait until it ends, or choose another folder with --out"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written to ({reason(error)}): choose another folder with --out"
        ) from error
    _held.add(key)
    try:
        started, token = datetime.now(UTC).isoformat(timespec="seconds"), secrets.token_hex(6)
        holder = {"host": platform.node(), "pid": os.getpid(), "started": started, "token": token}
        replace_text(key / HOLDER, json.dumps(holder) + "\n")
        yield
    finally:
        _held.discard(key)
        (key / HOLDER).unlink(missing_ok=True)
        if created and [file.name for file in key.glob("*")] == [LOCK]:  # refused before anything was written
            (key / LOCK).unlink()
        lock.release()
        with suppress(OSError):
            for path in created:
                path.rmdir()


def describe_holder(folder: Path) -> str:
    """Return which process holds a folder, in words."""
    try:
        holder = json.loads((folder / HOLDER).read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun
        return "another process"
