"""List the files of a folder, local or at any fsspec URL."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from stdit_data.errors import FileError
from stdit_data.storage import files, stores
from stdit_data.storage.urls import is_local, local_path

log = logging.getLogger(__name__)


def names(folder: str) -> list[str]:
    """List the names in a folder as it is now; none if it does not exist.

    Raises:
        FileError: the store can't be reached.
    """
    fs, path = files.filesystem(folder)
    fs.invalidate_cache(path)
    if not files.is_folder(folder):
        return []
    paths = files.patiently(folder, lambda: fs.ls(path, detail=False))
    return [str(name).rstrip("/").rsplit("/", 1)[-1] for name in paths]


def walk(folder: str) -> list[str]:
    """List all files below a folder, as sorted relative paths, without hidden ones (a leading dot).

    Linked folders are followed, each folder once: by its own name, or by the first link to it from outside.

    Raises:
        FileError: the store can't be reached.
    """
    if is_local(folder):
        return sorted(walk_local(folder))
    fs, root = files.filesystem(folder)
    root = fs._strip_protocol(root).rstrip("/")
    found = []

    def refuse(error: Exception) -> None:
        if stores.is_passing(error):
            raise error

    settings = {"on_error": refuse} if "http" in fs.protocol else {}  # else it leaves out folders that it can't list
    for path in files.patiently(folder, lambda: fs.find(root, **settings)):
        relative = str(path).removeprefix(root).lstrip("/")
        if not any(part.startswith(".") for part in relative.split("/")):
            found.append(relative)
    return sorted(found)


def walk_local(root: str) -> Iterator[str]:
    """Find the files of `walk` in a local folder one after another, in no order.

    Linked folders come after all others, so that those keep their names.
    """
    found, links = [""], deque[str]()
    seen: set[tuple[int, int]] = set()
    while found or links:
        folder = found.pop() if found else links.popleft()
        path = os.path.join(local_path(root), folder)  # noqa: PTH118 - keeps names that are not UTF-8
        about = files.patiently(path, Path(path).stat)
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        try:
            entries = files.patiently(path, partial(_list_folder, path))
        except FileError as error:
            if not folder or not isinstance(error.__cause__, PermissionError):
                raise
            log.warning("%s: left out: %s", path, error.__cause__.strerror)
            continue
        for base, leads_to_folder, is_link in entries:
            name = f"{folder}/{base}".lstrip("/")
            if base.startswith("."):
                continue
            if not leads_to_folder:
                yield name
            elif is_link:
                links.append(name)
            else:
                found.append(name)


def _list_folder(path: str) -> list[tuple[str, bool, bool]]:
    """Return the names in a folder in order, and of each whether it leads to a folder, and whether it is a link."""

    def leads_to_folder(entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError as error:
            if stores.is_passing(error, local=True):
                raise
            return False  # a link to itself, for one

    with os.scandir(path) as entries:
        return sorted((entry.name, leads_to_folder(entry), entry.is_symlink()) for entry in entries)
