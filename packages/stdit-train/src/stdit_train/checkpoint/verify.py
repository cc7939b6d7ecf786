"""Find the checkpoints of a run and check that they are whole."""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stdit_data.storage import stores
from stdit_model.errors import reason
from stdit_train.errors import ConfigError, RunEnded

FORMAT = 1
TENSORS, STATE = "tensors", "state.json"
INDEX = ".metadata"  # of the tensors, by torch.distributed.checkpoint

log = logging.getLogger(__name__)


class CheckpointError(ConfigError):
    """A checkpoint that is damaged or of another run."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified.

    Attributes:
        path: its folder.
        state: contents of state.json.
    """

    path: Path
    state: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, without verifying them."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def read_state(path: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
        OSError: the disk fails.
    """
    try:
        state = json.loads((path / STATE).read_text())
        assert isinstance(state["files"], dict)
        assert {"format", "run"} <= state.keys()
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: its {STATE} can't be read") from error
    return dict(state)


def verify(path: Path, run_id: str) -> Checkpoint:
    """Check that a checkpoint belongs to a run and that every file has the size and SHA-256 that were written.

    Only then is the index of the tensors read, which is pickled; every file that it names must be among them.

    Raises:
        CheckpointError: it does not, or a file is missing or changed.
        OSError: the disk fails, which says nothing of the checkpoint.
    """
    state = read_state(path)
    if (state["format"], state["run"]) != (FORMAT, run_id):
        raise CheckpointError(f"checkpoint {path} is of another run ({state['run']}, this is {run_id})")
    for name, known in state["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != known["bytes"] or sha256(file) != known["sha256"]:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written")
    if missing := sorted(tensor_files(path) - state["files"].keys()):
        raise CheckpointError(
            f"checkpoint {path} lacks {missing[0]}: another process wrote it into a run folder that was not shared"
        )
    return Checkpoint(path, state)


def tensor_files(path: Path) -> set[str]:
    """Return the files that the tensors of a checkpoint are in, by the index that rank 0 wrote for all processes."""
    from torch.distributed.checkpoint import FileSystemReader

    index = FileSystemReader(path / TENSORS).read_metadata()
    return {f"{TENSORS}/{name}" for name in (INDEX, *(data.relative_path for data in index.storage_data.values()))}


def newest_whole(folder: Path, run_id: str) -> Checkpoint | None:
    """Return the newest checkpoint of a run that is whole, None if the folder has no checkpoints.

    Newer ones that are not whole are renamed to refused-*, with a warning in the log.

    Raises:
        CheckpointError: there are checkpoints, but none is whole; they stay where they are.
        RunEnded: the disk fails, and goes on to.
    """
    refused: list[tuple[Path, CheckpointError]] = []
    for path in reversed(stores.retry(str(folder), lambda: list_checkpoints(folder), local=True)):
        try:
            checkpoint = stores.retry(str(path), partial(verify, path, run_id), local=True)
        except CheckpointError as error:
            refused.append((path, error))
            continue
        except OSError as error:
            raise RunEnded(
                f"cannot read {path} ({reason(error.__cause__ or error)}): check the disk, then resume with --resume"
            ) from error
        for bad, why in refused:
            aside = bad.with_name(f"refused-{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
            log.warning("%s; renamed to %s, the previous one is used", why, aside.name)
        return checkpoint
    if refused:
        raise CheckpointError(
            f"{refused[-1][1]}, and no earlier one is whole: start a new run in another folder with --out"
        )
    return None


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
