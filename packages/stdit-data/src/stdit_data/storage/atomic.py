"""Write files by path or URL, whole or not at all."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO

from stdit_data.errors import FileError
from stdit_data.storage.files import exists, filesystem, patiently, wrap_errors
from stdit_data.storage.urls import is_local, local_path, protocols

log = logging.getLogger(__name__)

STALE = 24 * 3600  # seconds without a change, after which an unfinished file is one of a killed process
ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf"}  # stores where a file appears when it is whole


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Write a local file or folder so that it appears whole or not at all.

    Yields a path beside `path` to write the file or folder to. It is renamed to `path` when the block ends, and removed
    if the block raises; what was at `path` before is then untouched.

    A process that is killed leaves an unfinished `.NAME.NUMBER.part` behind. A folder that is replaced is renamed to
    `.NAME.NUMBER.old` before the new one takes its name, and removed after that: killed between the two renames, a
    process leaves both, whole, under these names. The next folder that is written to `path` removes what is left.

    Args:
        path: the file or folder to write or replace; its parent folder must exist.

    Raises:
        FileError: `path` can't be written, the disk is full, or the unfinished file is gone.
    """
    path = Path(path)
    partial = path.with_name(unfinished_name(path.name))
    with wrap_errors(str(path)):
        try:
            yield partial
            if not partial.exists():
                raise FileError(f"{path}: the unfinished file is gone; does another process write the same file?")
            if partial.is_dir():
                _replace_folder(path, partial)
            else:
                _flush_to_disk(partial)
                partial.replace(path)
        finally:
            _remove(partial)


@contextmanager
def open_write(url: str) -> Iterator[IO[bytes]]:
    """Open a file or URL for writing; it appears whole or not at all, see `write_atomically`.

    A missing folder is created.

    Raises:
        FileError: it can't be written, or the unfinished file is gone.
    """
    if is_local(url):
        path = local_path(url)
        with wrap_errors(url):
            path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as partial, partial.open("wb") as file:
            yield file
        return
    buffer = BytesIO()
    yield buffer
    fs, stored = filesystem(url)
    if ATOMIC.intersection(protocols(url)[:1]):
        patiently(url, lambda: fs.pipe_file(stored, buffer.getvalue()))
        return
    folder, _, name = stored.rpartition("/")
    unfinished = f"{folder}/{unfinished_name(name)}"

    def store() -> None:
        fs.makedirs(folder, exist_ok=True)
        try:
            fs.pipe_file(unfinished, buffer.getvalue())
            fs.mv(unfinished, stored)
        except BaseException:
            with suppress(Exception):
                fs.rm_file(unfinished)
            raise

    patiently(url, store)


def write_bytes(url: str, data: bytes) -> None:
    """Write a file or URL, whole or not at all, see `open_write`."""
    with open_write(url) as file:
        file.write(data)


def write_new(url: str, data: bytes) -> None:
    """Write a file or URL, whole or not at all, unless there is one.

    On a local disk with hard links, of several processes one alone writes it. In a store the last one may.

    Raises:
        FileError: it can't be written.
    """
    if exists(url):
        return
    if not is_local(url):
        write_bytes(url, data)
        return
    path = local_path(url)
    partial = path.with_name(unfinished_name(path.name))
    with wrap_errors(url):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            _flush_to_disk(partial)
            try:
                os.link(partial, path)
            except FileExistsError:  # another process was first
                pass
            except OSError:  # no hard links here
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    """Write a local text file in UTF-8, whole or not at all; what is not Unicode is escaped, see `files.json_line`."""
    with write_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def unfinished_name(name: str) -> str:
    """Return a name for an unfinished file, unlike that of any other process: in containers, many have number 1."""
    return f".{name}.{os.getpid()}{secrets.randbelow(10**9):09d}.part"


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove the unfinished files and folders of killed processes: those that were not written to for `STALE` seconds.

    Args:
        folder: where they are.
        name: the name that they were to get. [default: any]
    """
    for partial in _leftovers(folder, name, "part"):
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in (partial, *partial.rglob("*")))
            if time.time() - newest > STALE:
                _remove(partial)


def _replace_folder(path: Path, new: Path) -> None:
    """Rename a new folder to `path`; what is there has another name until it is done, and is removed after that."""
    old = new.with_suffix(".old")
    try:
        with suppress(FileNotFoundError):
            path.rename(old)
        new.rename(path)
    finally:
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
    remove_unfinished(path.parent, path.name)
    for old in _leftovers(path.parent, path.name, "old"):  # those of killed processes, too
        try:
            _remove(old)
        except OSError as error:
            log.warning("%s: what was there before could not be removed (%s): remove %s", path, error.strerror, old)


def _leftovers(folder: Path, name: str | None, kind: str) -> list[Path]:
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.\d+\.{kind}")
    return [path for path in folder.glob(f".*.{kind}") if pattern.fullmatch(path.name)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    """Without this, a power cut could leave the new name with no data."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
