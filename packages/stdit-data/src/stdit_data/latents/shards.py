"""Reading tensors out of many safetensors files, a few of which are in use at a time.

Local files are mapped; one that will be wanted soon is read ahead into the system's page cache, which all processes of
a machine share. Files behind a URL are copied whole, once a machine, to a local folder, and removed there after use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import safe_open
from torch import Tensor

from stdit_data import files
from stdit_data.errors import DataError
from stdit_data.latents.format import shard_name

MOST_OPEN = 256  # files, as systems allow 1024 or so to a process


class ShardFiles:
    """The shards of one folder. Safe to use from several threads and processes.

    Args:
        folder: path or URL.
        keep: files held open (up to 256), and copies kept of a URL's files (by all processes together).
        copies: folder for these copies; below the user's cache folder without it.
    """

    def __init__(self, folder: str, keep: int, copies: str | Path | None = None) -> None:
        self.folder, self.keep = folder, max(2, keep)
        self.local = files.is_local(folder)
        self.copies = Path(copies) if copies is not None else _cache_folder(folder)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()
        self._expected: OrderedDict[int, None] = OrderedDict()  # asked for, and perhaps not opened yet
        self._pool: ThreadPoolExecutor | None = None

    def tensor(self, shard: int, key: str) -> Tensor:
        """A tensor of a shard; waits for a copy where there is none yet.

        Raises:
            DataError: the file is gone or damaged.
        """
        try:
            tensor = self._handle(shard).get_tensor(key)
        except FileNotFoundError:
            raise DataError(f"{self._url(shard)}: no such file; the cache is not whole") from None
        except Exception as error:
            if isinstance(error, (DataError, OSError)):
                raise
            raise DataError(f"{self._url(shard)}: damaged ({error})") from None
        return tensor.clone()  # read now, in this thread, rather than where it is first touched

    def expect(self, shards: Sequence[int]) -> None:
        """Starts to read ahead what will be wanted soon; those already asked for are left out."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="shards")
            for shard in shards:
                if shard not in self._open and shard not in self._expected:
                    self._expected[shard] = None
                    self._pool.submit(self._prepare, shard)
            while len(self._expected) > self.keep:
                self._expected.popitem(last=False)

    def close(self) -> None:
        """Ends reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _url(self, shard: int) -> str:
        return files.join(self.folder, shard_name(shard))

    def _prepare(self, shard: int) -> None:
        with contextlib.suppress(OSError, DataError):  # whoever needs the file will be told
            if self.local:
                _read_ahead(files.local_path(self._url(shard)))
            else:
                self._copy(shard)

    def _handle(self, shard: int) -> Any:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        for _ in range(3):  # another process may remove the copy before it is opened here
            path = files.local_path(self._url(shard)) if self.local else self._copy(shard)
            with contextlib.suppress(FileNotFoundError):
                handle = safe_open(path, framework="pt")
                break
        else:
            raise FileNotFoundError(path)
        with self._lock:
            self._open[shard] = handle
            while len(self._open) > min(self.keep, MOST_OPEN):
                self._open.popitem(last=False)
        return handle

    def _copy(self, shard: int) -> Path:
        """A local copy of a file, made by the first process that asks for it."""
        path = self.copies / shard_name(shard)
        if not path.exists():
            self.copies.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.exists():
                    self._make_room()
                    fs, source = files.filesystem(self._url(shard))
                    with files.write_atomically(path) as partial:
                        fs.get_file(source, str(partial))
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return path

    def _make_room(self) -> None:
        """Removes the copies not used for longest, and unfinished ones of dead processes."""
        copies = []
        for path in self.copies.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                copies.append((path.stat().st_mtime, path))
        for _, path in sorted(copies)[: max(0, len(copies) + 1 - self.keep)]:
            path.unlink(missing_ok=True)  # who has it open goes on reading it
        for path in self.copies.glob(".*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()


def _cache_folder(url: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "stdit" / "shards" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _read_ahead(path: Path) -> None:
    """Asks the system to read a whole file into its page cache, in order, without waiting for it."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system lets go when a process dies. Without locks (Windows) all go ahead."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
