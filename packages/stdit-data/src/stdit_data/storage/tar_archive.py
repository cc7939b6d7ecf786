"""Read tar archives in many threads."""

from __future__ import annotations

from io import BytesIO, RawIOBase
from threading import Lock
from typing import IO, Any

from fsspec.implementations.tar import TarFileSystem


class TarArchive(TarFileSystem):
    """fsspec's file system of a tar, whose files may be read by one thread each.

    They share one file of the archive, and with it its position: a thread has it for one read at a time. A file of a
    compressed archive is read whole when it is opened, since going back means to unpack the archive from its start.

    Args:
        fo: the archive, open for reading.
        settings: as for fsspec's.
    """

    def __init__(self, fo: IO[bytes], **settings: Any) -> None:
        super().__init__(fo, **settings)
        self.compressed = self.fo is not fo
        self.lock = Lock()

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> IO[bytes] | RawIOBase:
        with self.lock:
            file = super()._open(path, mode, **settings)
            return BytesIO(file.read()) if self.compressed else _Locked(file, self.lock, self.info(path)["size"])


class _Locked(RawIOBase):
    def __init__(self, file: Any, lock: Lock, size: int) -> None:
        self.file, self.lock, self.size = file, lock, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def readinto(self, buffer: Any) -> int:
        with self.lock:
            return int(self.file.readinto(buffer))

    def readall(self) -> bytes:
        with self.lock:
            return bytes(self.file.read())
