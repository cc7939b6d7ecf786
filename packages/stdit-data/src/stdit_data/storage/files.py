"""Read files by path or fsspec URL: local, `zip://a.mp4::/path/clips.zip`, `s3://bucket/a.mp4` and so on.

Every error is a `DataError` that names the file. What a URL is: `urls`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from io import SEEK_END, BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.utils import infer_compression

from stdit_data.errors import DataError, FileError, MissingFileError
from stdit_data.storage import stores
from stdit_data.storage.remote_file import KEPT, RemoteFile
from stdit_data.storage.tar_archive import TarArchive
from stdit_data.storage.urls import is_image, is_local, layers, local_path, protocols

log = logging.getLogger(__name__)

T = TypeVar("T")

PIECE = 4 << 20  # bytes of a file that a thread copies at once
PIECES = 8  # of a file, that are copied or wait to be written


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL and the path within it. Archives are opened once and kept open.

    Raises:
        DataError: the protocol is unknown, or an archive is missing or damaged.
        StoreError: the protocol's package is not installed, or the store does not answer.
    """
    head, *rest = layers(url)
    protocol, path = split_protocol(head)
    with wrap_errors(url):
        try:
            if rest and protocol:
                return _archive(protocol, "::".join(rest)), path
            if is_local(url):
                return LocalFileSystem(), LocalFileSystem._strip_protocol(str(local_path(url)))
            fs, path = url_to_fs(url, **stores.options(protocols(url)))
            return fs, path
        except zipfile.BadZipFile:
            raise DataError(f"{'::'.join(rest)}: not a zip file, or a damaged one") from None
        except FileNotFoundError:
            raise MissingFileError(f"{'::'.join(rest) or url}: no such file") from None
        except ImportError as error:
            missing_package = stores.missing_extra(url, protocols(url), error)
            raise missing_package or DataError(f"{url}: {str(error).splitlines()[0]}") from None
        except (DataError, OSError):
            raise
        except ValueError as error:
            raise DataError(f"{url}: {str(error).splitlines()[0]}") from None


@contextmanager
def wrap_errors(url: str) -> Iterator[None]:
    """Turn what the system or the client of a store raises into a `FileError` that names the file.

    Each store's client has errors of its own, few of them `OSError`. For a local file any other error is a bug of ours
    and passes through.
    """
    try:
        yield
    except (DataError, EOFError, zipfile.BadZipFile, zlib.error):
        raise
    except FileNotFoundError as error:
        if stores.http_status(error) not in (None, 404, 410):  # which fsspec tells as a missing file too
            raise FileError(f"{url}: {stores.explain(error)}") from error
        raise MissingFileError(f"{_name(error, url)}: no such file or folder") from None
    except OSError as error:
        raise FileError(f"{_name(error, url)}: {error.strerror or error}") from error
    except Exception as error:
        if is_local(url):
            raise
        words = " ".join(str(error).split())
        raise FileError(f"{url}: {type(error).__name__}{': ' if words else ''}{words}") from error


def patiently(url: str, work: Callable[[], T]) -> T:
    """Do something with a file, waiting for its store or disk while faults pass; see `stores`.

    Args:
        url: the file.
        work: what to do; may be called many times.

    Raises:
        FileError: as `wrap_errors` does; a `StoreError` if the faults do not pass.
    """
    with wrap_errors(url):
        return stores.retry(url, work, local=_on_disk(url))


def is_passing(url: str, error: BaseException) -> bool:
    """Return whether an error says nothing about a file, since its store or disk failed; see `stores.is_passing`."""
    return stores.is_passing(error, local=_on_disk(url))


def exists(url: str) -> bool:
    """Return whether a file or folder exists.

    Raises:
        FileError: the store can't be reached.
    """
    fs, path = filesystem(url)
    # Together: `exists` says no where a store does not answer, which is no answer.
    return patiently(url, lambda: bool(fs.exists(path)) or _has_info(fs, path))


def is_folder(url: str) -> bool:
    """Return whether a URL is an existing folder.

    Raises:
        FileError: the store can't be reached.
    """
    fs, path = filesystem(url)
    return patiently(url, lambda: bool(fs.isdir(path)) or (_has_info(fs, path) and bool(fs.isdir(path))))


def size(url: str) -> int:
    """Return the size of a file in bytes.

    Raises:
        FileError: the file does not exist, or the store can't be reached.
    """
    fs, path = filesystem(url)
    return patiently(url, lambda: int(fs.size(path)))


def info(url: str) -> dict[str, Any]:
    """Return what a store tells of a file, under names of its own; `size` is in bytes.

    Raises:
        FileError: the file does not exist, or the store can't be reached.
    """
    fs, path = filesystem(url)
    return patiently(url, lambda: dict(fs.info(path)))


def cache_folder(name: str) -> Path:
    """Return a folder of ours in the user's cache folder; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stdit" / name


def copy(url: str, path: str | Path, pool: ThreadPoolExecutor | None = None) -> None:
    """Copy a file to a local path.

    Args:
        url: the file.
        path: where to; what is there is overwritten.
        pool: threads that fetch pieces of the file at the same time.

    Raises:
        FileError: the file does not exist, or can't be read or written.
    """
    fs, source = filesystem(url)
    if pool is not None and len(layers(url)) == 1 and not is_local(url):
        total = size(url)

        settings = {} if fs.async_impl else {"cache_type": "none"}  # others open the file, to read ahead of the piece

        def fetch(start: int) -> bytes:
            end = min(start + PIECE, total)
            return bytes(patiently(url, lambda: fs.cat_file(source, start=start, end=end, **settings)))

        with Path(path).open("wb") as file:
            starts = iter(range(0, total, PIECE))
            jobs = deque((start, pool.submit(fetch, start)) for start in islice(starts, PIECES))
            while jobs:
                start, job = jobs.popleft()
                data = job.result()
                if len(data) != min(PIECE, total - start):  # a server that gives whole files alone
                    break
                file.write(data)
                jobs.extend((start, pool.submit(fetch, start)) for start in islice(starts, 1))
            else:
                return
    patiently(url, lambda: fs.get_file(source, str(path)))


@contextmanager
def open_binary(url: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, as a seekable binary file.

    Raises:
        FileError: the file does not exist or can't be read; also while reading a remote file.
    """
    with _open(url) as file:
        yield file


def read_text(url: str, *, escape: bool = False, limit: int | None = None) -> str:
    """Read a text file in UTF-8, without a byte-order mark.

    Args:
        url: the file.
        escape: decode bytes that are not UTF-8 as Python does in file names, instead of raising.
        limit: most bytes of the file; no more than these are read, or unpacked from an archive.

    Raises:
        DataError: the file does not exist, can't be read, is larger than the limit, or is not UTF-8.
    """

    def read() -> bytes:
        with open_binary(url) as file:
            return file.read() if limit is None else file.read(limit + 1)

    data = patiently(url, read)
    if limit is not None and len(data) > limit:
        raise DataError(f"{url}: larger than {limit // 1024} KiB, the most that a text of this kind may have")
    try:
        return data.decode("utf-8-sig", "surrogateescape" if escape else "strict")
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def missing(url: str) -> str:
    r"""Say that there is no such file; of a path with `\` also why, where that is no separator."""
    hint = r"; it has backslashes: separate folders by /" if os.sep == "/" and "\\" in url else ""
    return f"no such file{hint}"


@contextmanager
def open_media(url: str) -> Iterator[str | IO[bytes]]:
    """Open a video or image for PyAV or Pillow: as a path if local, since FFmpeg reads that faster, else as a file.

    Raises:
        FileError: the file does not exist or can't be opened.
    """
    if is_local(url):
        path = local_path(url)
        if not patiently(url, lambda: _is_regular(path)):
            raise MissingFileError(f"{url}: {missing(url)}")
        yield str(path)
    else:
        with open_binary(url) as file:
            # A picture is read whole, and going back in a file of a zip means to unpack it from its start.
            if isinstance(file, RemoteFile) and (is_image(url) or (protocols(url)[0] == "zip" and file.size <= KEPT)):
                file.plan(0, file.size)
            yield file


def json_line(row: Any) -> bytes:
    """Return a value as a line of JSON in UTF-8; file names that are not UTF-8 are escaped, and read back the same."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


@lru_cache(maxsize=16)
def _archive(protocol: str, rest: str) -> Any:
    """Open an archive by a file of ours, which waits for its store and may have `::` in its name."""
    if protocol == "zip":
        return fsspec.filesystem("zip", fo=_open(rest), skip_instance_cache=True)
    if protocol == "tar":
        compression = infer_compression(layers(rest)[0])
        return TarArchive(_open(rest), compression=compression, skip_instance_cache=True)
    return url_to_fs(f"{protocol}://::{rest}", **stores.options(protocols(rest)))[0]


def _open(url: str) -> IO[bytes]:
    fs, path = filesystem(url)
    if isinstance(fs, MemoryFileSystem):  # all its open files share one position, also between threads
        with wrap_errors(url):
            return BytesIO(fs.cat_file(path))
    # Caches that the user has put into the URL read as they are told.
    settings = {} if isinstance(fs, CachingFileSystem) else {"cache_type": "none"}
    file = patiently(url, lambda: fs.open(path, "rb", **settings))
    if is_local(layers(url)[-1]):
        return cast(IO[bytes], file)
    if not file.seekable():  # a server that gives whole files alone
        file.close()
        return BytesIO(patiently(url, lambda: fs.cat_file(path)))

    size = getattr(file, "size", None)

    def fetch(start: int, end: int) -> bytes:
        file.seek(start)
        data = b""
        while len(data) < end - start:
            more = file.read(end - start - len(data))
            if not more:
                raise FileError(f"{url}: ends at byte {start + len(data)}; has it changed while it was read?")
            data = data + more if data else more
        return data

    return cast(
        IO[bytes],
        RemoteFile(
            url,
            size if isinstance(size, int) else patiently(url, lambda: file.seek(0, SEEK_END)),
            lambda start, end: patiently(url, lambda: fetch(start, end)),
        ),
    )


def _is_regular(path: Path) -> bool:
    """As `path.is_file()`, which says no wherever it can't tell."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _has_info(fs: Any, path: str) -> bool:
    """Return whether a file system knows a file or folder; raise where it can't tell, unlike others of its methods."""
    try:
        fs.info(path)
    except Exception as error:
        if stores.is_passing(error, local=isinstance(fs, LocalFileSystem)):
            raise
        return False
    return True


def _name(error: OSError, url: str) -> str:
    """The file that an error is about; `url` for an unfinished file of its own."""
    name = str(error.filename or url)
    return url if not is_local(url) or re.search(r"\.\d+\.part(/|$)", name) else name


def _on_disk(url: str) -> bool:
    return is_local(layers(url)[-1])
