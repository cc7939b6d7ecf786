"""Read tensors from many safetensors files, a few of which are in use at a time.

Local files are memory-mapped; those needed next are read ahead into the page cache, which all processes of a machine
share. Files at a URL are copied to a local folder, once per machine, by several requests at a time, and removed there
after use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stdit_data.errors import DataError, MissingFileError
from stdit_data.latents.format import shard_name
from stdit_data.storage import atomic, files, readers, urls

COPIED = 3  # files of a URL that are copied at a time
STREAMS = 8  # requests for pieces of them at a time
MAX_OPEN = 256  # files; systems allow about 1024 per process


class ShardFiles:
    """The shards of one folder. Safe to use from several threads and processes.

    Args:
        folder: path or URL.
        keep: number of files to keep open (up to 256), and for a URL the number of copies to keep, of all processes.
        copies: folder for the copies of a URL's files; by default below the user's cache folder.
    """

    def __init__(self, folder: str, keep: int, copies: str | Path | None = None) -> None:
        self.folder, self.keep = folder, max(2, keep)
        self.local = urls.is_local(folder)
        self.copies = Path(copies) if copies is not None else _own_folder(folder)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()
        self._ahead: OrderedDict[int, readers.Reader] = OrderedDict()  # of shards requested, perhaps not opened yet
        self._pool: ThreadPoolExecutor | None = None  # reads ahead
        self._streams = readers.Helpers(STREAMS, thread_name_prefix="shard-pieces")  # fetch pieces of a URL's files

    def tensor(self, shard: int, key: str) -> Tensor:
        """Read a tensor of a shard; waits until the shard is copied here if it is at a URL.

        Raises:
            DataError: the file is missing, damaged or can't be read.
        """
        url = self._url(shard)
        try:
            tensor: Tensor = self._handle(shard).get_tensor(key)
        except FileNotFoundError:
            raise MissingFileError(f"{url}: no such file; the cache is incomplete") from None
        except SafetensorError as error:
            raise DataError(f"{url}: damaged ({error})") from None
        return tensor.clone()  # read now, in this thread, rather than when it is first used

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start to read ahead shards that are needed soon; those already requested are skipped."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1 if self.local else COPIED, thread_name_prefix="shards")
            for shard in shards:
                if shard not in self._open and shard not in self._ahead:
                    self._ahead[shard] = reader = readers.Reader()
                    self._pool.submit(self._prepare, shard, reader)
            while len(self._ahead) > self.keep:
                self._ahead.popitem(last=False)

    def _url(self, shard: int) -> str:
        return urls.join(self.folder, shard_name(shard))

    def _prepare(self, shard: int, reader: readers.Reader) -> None:
        with reader.at_work(), contextlib.suppress(OSError, DataError):  # `tensor` raises them if the file is needed
            if self.local:
                _read_ahead(urls.local_path(self._url(shard)))
            elif not reader.is_set():  # else who asked for it has ended, or copies it itself
                self._copy(shard)

    def _handle(self, shard: int) -> Any:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            if shard in self._ahead:
                self._ahead[shard].set()  # a copy that waits for its store ends: this thread waits for it, not twice
        for _ in range(3):  # another process may remove the copy before it is opened here
            path = urls.local_path(self._url(shard)) if self.local else self._copy(shard)
            with contextlib.suppress(FileNotFoundError):
                handle = files.patiently(str(path), partial(safe_open, path, framework="pt"))
                break
        else:
            raise FileNotFoundError(path)
        with self._lock:
            self._open[shard] = handle
            while len(self._open) > min(self.keep, MAX_OPEN):
                self._open.popitem(last=False)
        return handle

    def _copy(self, shard: int) -> Path:
        """Return a local copy of a file, made by the first process that needs it."""
        path = self.copies / shard_name(shard)
        if not path.exists():
            with files.wrap_errors(str(self.copies)):
                self.copies.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    self._make_room()
                    url = self._url(shard)
                    with atomic.write_atomically(path) as partial:
                        files.copy(url, partial, self._streams)
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return path

    def _make_room(self) -> None:
        """Remove the least recently used copies, and unfinished ones of killed processes."""
        copies = []
        for path in self.copies.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                copies.append((path.stat().st_mtime, path))
        for _, path in sorted(copies)[: max(0, len(copies) + 1 - self.keep)]:
            path.unlink(missing_ok=True)  # processes that have it open can still read it
        for path in self.copies.glob(".*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()


def _own_folder(url: str) -> Path:
    return files.cache_folder("shards") / hashlib.sha256(url.encode()).hexdigest()[:16]


def _read_ahead(path: Path) -> None:
    """Ask the system to read a whole file into its page cache, without waiting for it."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
