"""Who reads files in threads, and what ends the waiting of these for stores that fail: see `stores`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from threading import Event, RLock, local
from typing import Any, TypeVar
from weakref import WeakSet

from stdit_data.errors import StoreError

S = TypeVar("S")
T = TypeVar("T")

_own = local()  # `reader`: whom this thread reads for
_lock = RLock()


class Reader(Event):
    """Who reads files in threads, such as a loader: an event that is set when these are to wait for stores no more.

    It belongs to the reader of the thread that makes it, and is set with it; `release` sets all. What a reader reads is
    then tried once. The end of its patience sets it, too, and all that it still reads of stores fails with that error.

    Args:
        top: belong to no other reader.

    Attributes:
        lost: the error of the store that it has waited for in vain, None before.
    """

    def __init__(self, *, top: bool = False) -> None:
        super().__init__()
        self.lost: StoreError | None = None
        self._parts: WeakSet[Reader] = WeakSet()
        self._above = None if top else current()
        if self._above is not None:
            with _lock:
                self._above._parts.add(self)
            if self._above.is_set():
                self.set()

    def set(self) -> None:
        """End the waiting of this reader's threads, and of the readers that these have made."""
        super().set()
        with _lock:
            parts = list(self._parts)
        for part in parts:
            part.set()

    def give_up(self, error: StoreError) -> StoreError:
        """Set this reader, as its patience has ended; return the first such error."""
        if self._above is None:  # of threads that have nothing to do with one another
            return error
        with _lock:
            self.lost = self.lost or error
        self.set()
        return self.lost

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Read for this reader in this thread."""
        before = getattr(_own, "reader", None)
        _own.reader = self
        try:
            yield
        finally:
            _own.reader = before


_everyone = Reader(top=True)


def current() -> Reader:
    """Return the reader of this thread; one for all threads that have none."""
    return getattr(_own, "reader", None) or _everyone


def release() -> None:
    """End all waiting for stores in this process, so that a program that is to stop can stop.

    The readers that there are wait no more. Those made later do, and so does what then reads for no reader.
    """
    global _everyone
    before, _everyone = _everyone, Reader(top=True)
    before.set()


class Helpers(ThreadPoolExecutor):
    """A pool of threads that do each piece of work for the reader of the thread that gives it to them."""

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Do a piece of work in one of the threads."""
        return super().submit(current().at_work()(work), *args, **kwargs)


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Give a pool of threads that read files for one reader; an error or Ctrl-C ends their waiting for stores."""
    reader = Reader()
    with ThreadPoolExecutor(max(1, count), initializer=setattr, initargs=(_own, "reader", reader)) as pool:
        try:
            yield pool
        except BaseException:
            reader.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def map_in_threads(work: Callable[[S], T], items: Iterable[S], count: int) -> Iterator[T]:
    """Yield what `work` returns for each item, in order; up to 4 times as many items as threads are in the works.

    Args:
        work: called in `count` threads, see `threads`.
        items: may be millions.
        count: number of threads.
    """
    rest = iter(items)
    with threads(count) as pool:
        jobs = deque(pool.submit(work, item) for item in islice(rest, 4 * max(1, count)))
        while jobs:
            yield jobs.popleft().result()
            jobs.extend(pool.submit(work, item) for item in islice(rest, 1))
