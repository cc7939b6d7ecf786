"""Tell passing faults of stores (S3, HTTP and so on) and disks from lasting ones, and wait for them to end.

A fault that passes (a server error, too many requests, a timeout, a broken connection; a disk or a mounted folder that
cannot be read) says nothing about the file. What failed is tried again, at growing intervals, for `patience` minutes;
then a `StoreError` is raised. Who reads in threads is a `Reader`, whose waiting can be ended.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from threading import Event, RLock, local
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakSet

import fsspec
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_delay,
    stop_when_event_set,
    wait_random_exponential,
)

from stdit_data.errors import StoreError

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

PATIENCE = 10.0  # minutes
FIRST_PATIENCE = 0.25  # minutes, for a store that has not answered yet: its address may be wrong
TIMEOUT = 60.0  # seconds without a connection or data
QUIET = 5.0  # seconds of failures before they are logged

# From a protocol to the extra of stdit-data that installs what fsspec needs for it.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf", "http": "https", "https": "https"}

# HTTP: request timeout, too early, too many requests; and server errors but "not implemented" and the like.
PASSING_STATUS = {408, 425, 429, *range(500, 600)} - {501, 505, 506, 508, 510}
PASSING_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,  # what s3fs makes of SlowDown
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
}
# Of a local file: the disk or the mounted folder fails, or this process has too many files open.
PASSING_ERRNO_OF_DISK = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
# Classes of the stores' clients, by the package and name of the class or of one that it derives from.
LASTING = {"aiohttp.ClientSSLError", "aiohttp.InvalidURL", "botocore.SSLError", "requests.SSLError"}
PASSING = {
    "aiohttp.ClientConnectionError",
    "aiohttp.ClientPayloadError",
    "botocore.ConnectionError",
    "botocore.HTTPClientError",
    "google.TransportError",
    "http.IncompleteRead",
    "httpx.TransportError",
    "requests.ChunkedEncodingError",
    "requests.ConnectionError",
    "requests.Timeout",
}

_patience = PATIENCE
_answered: set[str] = set()
_failing: set[str] = set()
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


def set_patience(minutes: float) -> None:
    """Set how long this process waits for a store that fails, in minutes; 10 unless set."""
    global _patience
    _patience = minutes


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


def is_passing(error: BaseException, *, local: bool = False) -> bool:
    """Return whether an error is one that passes: the same request may succeed later.

    With `local` it is of a file on a disk or in a mounted folder, else of a store. There a client's own error decides
    where fsspec has put another on top: its HTTP client says that a file does not exist whenever it cannot look it up.
    """
    if local:
        chain = list(_chain(error))
        waited = any(isinstance(one, StoreError) for one in chain)
        return not waited and any(isinstance(one, OSError) and one.errno in PASSING_ERRNO_OF_DISK for one in chain)
    return next((verdict for one in _chain(error) if (verdict := _verdict(one)) is not None), False)


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error, or one that it comes from, tells; None if there is none."""
    return next((status for one in _chain(error) if (status := _status(one)) is not None), None)


def explain(error: BaseException) -> str:
    """Say on one line what an error comes from: `HTTP 503`, `TimeoutError`, or its class and message."""
    if (status := http_status(error)) is not None:
        return f"HTTP {status}"
    cause = next((one for one in _chain(error) if _verdict(one) is not None or getattr(one, "errno", None)), error)
    words = " ".join(str(getattr(cause, "strerror", None) or cause).split())
    return f"{type(cause).__name__}: {words}" if words else type(cause).__name__


def retry(url: str, work: Callable[[], T], *, local: bool = False) -> T:
    """Return what `work` does with a file, trying again while its errors pass.

    Args:
        url: URL of the file; it names the store in messages.
        work: what to do; may be called many times.
        local: see `is_passing`.

    Raises:
        StoreError: the errors did not pass within the patience, or the reader of this thread was set.
    """
    if local:
        try:
            return work()  # nearly always
        except Exception as error:
            if not is_passing(error, local=True):
                raise
    reader = current()
    if reader.lost is not None:
        raise reader.lost
    passing = partial(is_passing, local=local)
    store = "the disk" if local else _store(url)
    minutes = _patience if local or store in _answered else min(_patience, FIRST_PATIENCE)
    backoff = wait_random_exponential(multiplier=0.2, max=30)

    def wait(state: RetryCallState) -> float:
        return min(backoff(state), max(0.05, 60 * minutes - (state.seconds_since_start or 0)))

    def report(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if error is not None and (state.seconds_since_start or 0) > QUIET and store not in _failing:
            _failing.add(store)
            log.warning("%s fails (%s); trying again for %g minutes", store, explain(error), minutes)

    attempts = Retrying(
        retry=retry_if_exception(passing),
        stop=stop_after_delay(60 * minutes) | stop_when_event_set(reader),
        wait=wait,
        sleep=sleep_using_event(reader),
        before_sleep=report,
        reraise=True,
    )
    try:
        done = attempts(work)
    except Exception as error:
        if not passing(error):
            raise
        until = "until it was interrupted" if reader.is_set() else f"for {minutes:g} minutes"
        raise reader.give_up(
            StoreError(
                f"{url}: {'the disk' if local else 'the store'} failed {until} ({explain(error)}); try again later"
            )
        ) from error
    _answered.add(store)
    if store in _failing:
        _failing.discard(store)
        log.warning("%s answers again", store)
    return done


def options(protocols: list[str]) -> dict[str, dict[str, Any]]:
    """Return the options of fsspec filesystems that set timeouts, by protocol.

    s3fs and huggingface-hub have timeouts of their own. What the user's fsspec configuration sets is left to it.
    """
    found: dict[str, dict[str, Any]] = {}
    for protocol, name in (("http", "client_kwargs"), ("https", "client_kwargs"), ("gs", "session_kwargs")):
        if protocol in protocols and name not in fsspec.config.conf.get(protocol, {}):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
            found[protocol] = {name: {"timeout": timeout}}
    return found


def missing_extra(url: str, protocols: list[str], error: Exception) -> StoreError | None:
    """Return the error for a store whose package is not installed; None for a protocol without an extra."""
    extra = next((EXTRAS[name] for name in protocols if name in EXTRAS), None)
    if extra is None:
        return None
    return StoreError(
        f"{url}: {str(error).splitlines()[0]}; install it: uv sync --extra {extra}, or pip install stdit-data[{extra}]"
    )


def _store(url: str) -> str:
    parts = urlsplit(url.rpartition("::")[2])
    return f"{parts.scheme}://{parts.netloc}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it comes from, without the file errors that stand for their cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        below = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if below is None or not isinstance(error, FileNotFoundError):
            yield error
        error = below


def _verdict(error: BaseException) -> bool | None:
    """Return whether an error passes; None if it does not tell."""
    if isinstance(error, StoreError):  # waited for already
        return False
    status = _status(error)
    if status is not None:
        return status in PASSING_STATUS
    names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(error).__mro__}
    if names & LASTING:
        return False
    if names & PASSING or isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if isinstance(error, OSError) and error.errno in PASSING_ERRNO:
        return True
    return False if isinstance(error, (FileNotFoundError, PermissionError)) else None


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of aiohttp, gcsfs, botocore, requests or httpx."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) and 100 <= found < 600 else None
