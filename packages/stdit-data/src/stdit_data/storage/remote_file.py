"""Read a file of a store by ranges of little more than the bytes that are asked for, in few requests."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from io import SEEK_CUR, SEEK_END, RawIOBase
from typing import Any

FIRST = 128 << 10  # bytes of the first request for the start of a file, where headers lie
LEAST = 64 << 10  # bytes of any other request
MOST = 8 << 20
TAIL = 256 << 10  # bytes at the end of a file, where indexes lie, that are requested at once
AHEAD = 1 / 4  # of the bytes that were read one after another: how many of the next come with a request
KEPT = 32 << 20  # bytes of a file that stay in memory, the last used


class RemoteFile(RawIOBase):
    """A file of a store, for one thread at a time.

    fsspec's own caches read a block of 5 MiB wherever a decoder seeks to. Here a request is for what is asked for and
    a quarter of what was read before it; and all of a range that is planned is requested together.

    Args:
        url: the file.
        size: of the file, in bytes.
        fetch: returns the bytes from a start to an end, exclusive.
    """

    def __init__(self, url: str, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self.url, self.size, self._fetch = url, size, fetch
        self._at = 0
        self._spans: OrderedDict[int, bytes] = OrderedDict()  # by their start; the last used at the end
        self._planned: deque[tuple[int, int]] = deque(maxlen=16)

    def plan(self, start: int, end: int) -> None:
        """Request the bytes from `start` to `end`, exclusive, together as soon as one of them is read."""
        self._planned.append((start, end))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + {SEEK_CUR: self._at, SEEK_END: self.size}.get(whence, 0))
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self._at < self.size:
            piece = self._piece(len(view) - done)
            view[done : done + len(piece)] = piece
            done, self._at = done + len(piece), self._at + len(piece)
        return done

    def readall(self) -> bytes:
        return self.read(max(0, self.size - self._at)) or b""

    def _piece(self, count: int) -> memoryview:
        """Return up to `count` bytes from the current place on, at least one."""
        for start in reversed(self._spans):
            offset = self._at - start
            if 0 <= offset < len(self._spans[start]):
                self._spans.move_to_end(start)
                return memoryview(self._spans[start])[offset : offset + count]
        end = self._end_of_request(count)
        data = self._fetch(self._at, end)
        if len(data) != end - self._at:
            raise OSError(f"{len(data)} bytes came for {end - self._at}; has the file changed while it was read?")
        self._spans[self._at] = data
        while len(self._spans) > 1 and sum(map(len, self._spans.values())) > KEPT:
            self._spans.popitem(last=False)
        return memoryview(data)[:count]

    def _end_of_request(self, count: int) -> int:
        at = self._at
        planned = [end for start, end in self._planned if start <= at < end]
        if planned:
            ahead = max(planned) - at
        elif self.size - at <= TAIL:
            ahead = self.size - at
        else:
            ahead = FIRST if at == 0 else max(LEAST, int(AHEAD * self._read_before()))
        end = min(at + min(max(count, ahead), MOST), self.size)
        return min([end, *(start for start in self._spans if start > at)])

    def _read_before(self) -> int:
        """Return the number of bytes before this place that were read one after another, planned ones left out."""
        start = self._at
        starts = {begin + len(data): begin for begin, data in self._spans.items()}
        while start in starts:
            start = starts[start]
        return self._at - max([start, *(end for _, end in self._planned if end <= self._at)])
