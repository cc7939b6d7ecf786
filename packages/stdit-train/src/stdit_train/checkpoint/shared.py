"""Check that all processes of a run see the same run folder: what each wrote into its own could not be resumed."""

import json
import platform
import time
from contextlib import ExitStack
from pathlib import Path

from stdit_train.checkpoint.lock import HOLDER, lock_folder
from stdit_train.distributed.world import World
from stdit_train.errors import ConfigError

VISIBLE = 60.0  # seconds within which a network file system shows a new file to the other machines
PAUSE = 0.2  # seconds


def check_shared(world: World, folder: Path) -> None:
    """Check that all processes see what rank 0 writes into a folder; every process must call this.

    Rank 0 holds the folder's lock meanwhile; the others must see the token in the lock's file.

    Raises:
        ConfigError: one does not; the message names it and its host.
        FolderInUseError: another run holds the folder.
    """
    if world.size == 1:
        return
    with ExitStack() as held:

        def write() -> tuple[str, str | None]:
            held.enter_context(lock_folder(folder))
            return platform.node(), _token(folder)

        host, token = world.broadcast_from_main(write)
        blind = None
        if not _sees(folder, token, 0.0 if world.is_main else VISIBLE):
            blind = f"process {world.rank} on {platform.node()}"
        blind = world.first_result([blind])

        def refuse() -> None:
            if blind is not None:
                raise ConfigError(
                    f"{blind} does not see the run folder {folder} of process 0 on {host}: choose one with --out on a "
                    "disk that all machines share"
                )

        world.broadcast_from_main(refuse)


def _sees(folder: Path, token: str | None, patience: float) -> bool:
    end = time.monotonic() + patience
    while _token(folder) != token:
        if time.monotonic() > end:
            return False
        time.sleep(PAUSE)
    return True


def _token(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / HOLDER).read_text())["token"])
    except (OSError, ValueError, KeyError, TypeError):  # not there yet
        return None
