"""Keep the tables of long manifests in the user's cache folder, where all processes of a machine map them into memory.

A table belongs to a file's URL and to what tells one version of it from another: size, times and inode, or a store's
own tag. A file without such a thing is read by each process that opens it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from stdit_data.errors import FileError
from stdit_data.storage import atomic, files, urls

log = logging.getLogger(__name__)

VERSION = 2  # of the tables; another one when rows are read in another way
LEAST = 4 << 20  # bytes of a manifest whose table is kept
KEPT = 16  # tables, the latest used
TAGS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "updated")  # of stores


def open_table(url: str, read: Callable[[], Iterator[pa.RecordBatch]]) -> pa.Table:
    """Return the table of a manifest, mapped from the file that the first process to open the manifest wrote.

    Args:
        url: the manifest.
        read: reads it, one batch of rows after another; called by one process of a machine at a time, and again where
            its store or disk fails.
    """
    version = _version(url)
    if version is None:
        return files.patiently(url, lambda: pa.Table.from_batches(read()))
    name = hashlib.sha256(urls.canonical(url).encode(errors="surrogateescape")).hexdigest()[:16]
    path = files.cache_folder("manifests") / f"{name}-{hashlib.sha256(version.encode()).hexdigest()[:16]}.arrow"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f"{name}.lock"):
            table = _mapped(path)
            if table is None:
                files.patiently(url, lambda: _write(path, read()))
                table = _mapped(path)
                if _version(url) != version:  # written to meanwhile
                    path.unlink(missing_ok=True)  # what is mapped can still be read
        if table is not None:
            return table
    except (FileError, OSError) as error:
        if urls.printable(str(path.parent)) not in urls.printable(str(error)):
            raise
        log.warning("%s: its table can't be kept, so that every process reads it: %s", url, error)
    return files.patiently(url, lambda: pa.Table.from_batches(read()))


def _version(url: str) -> str | None:
    """Return what changes when a file does; None if nothing tells, or the file is short."""
    if len(urls.layers(url)) > 1:
        return None
    if urls.is_local(url):
        about = files.patiently(url, urls.local_path(url).stat)
        size = about.st_size
        tags: list[object] = [about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    else:
        found = files.info(url)
        size = int(found.get("size") or 0)
        tags = [str(found[tag]) for tag in TAGS if found.get(tag)]
    return repr((VERSION, size, tags)) if tags and size >= LEAST else None


def _mapped(path: Path) -> pa.Table | None:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        os.utime(path)
        return table
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError):  # damaged: it is written again
        return None


def _write(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    others = sorted(path.parent.glob("*.arrow"), key=_used, reverse=True)
    with suppress(OSError):
        for number, other in enumerate(others):
            if other.name[:16] == path.name[:16] or number >= KEPT - 1:  # of a file that has changed; the oldest
                other.unlink(missing_ok=True)  # processes that have it mapped can still read it
        atomic.remove_unfinished(path.parent)
    first = next(batches)
    with atomic.write_atomically(path) as partial, pa.ipc.new_file(str(partial), first.schema) as writer:
        for batch in chain([first], batches):
            writer.write_batch(batch)


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
