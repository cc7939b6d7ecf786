"""Tell passing faults of stores (S3, HTTP and so on) and disks from lasting ones, and wait for them to end.

A fault that passes (a server error, too many requests, a timeout, a broken connection; a disk or a mounted folder that
cannot be read) says nothing about the file. What failed is tried again, at growing intervals, for `patience` minutes;
then a `StoreError` is raised. What ends the waiting before is in `readers`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

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
from stdit_data.storage import readers

log = logging.getLogger(__name__)

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


def set_patience(minutes: float) -> None:
    """Set how long this process waits for a store that fails, in minutes; 10 unless set."""
    global _patience
    _patience = minutes


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
    reader = readers.current()
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
