"""Who waits for a store that fails, and what ends it: readers, such as a loader or a pool of threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip
from stdit_data.errors import StoreError
from stdit_data.latents.shards import ShardFiles
from stdit_data.loading.loader import ClipLoader
from stdit_data.manifests.format import read_manifest
from stdit_data.storage import files, readers, stores

INTERRUPTED = "failed until it was interrupted"


class Store:
    """A store that answers or not.

    Attributes:
        down: whether it fails.
        asked: set once it has been asked for a file.
        files: those that it has been asked for.
    """

    def __init__(self) -> None:
        self.down, self.asked, self.files = True, Event(), set[int]()

    def read(self, file: int = 0) -> str:
        """Read a file."""

        def work() -> str:
            self.files.add(file)
            self.asked.set()
            if self.down:
                raise ConnectionError("down")
            return "content"

        return stores.retry(f"http://store/{file}.mp4", work)


class Clips:
    """A data set of that store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return 64

    def bucket(self, index: int) -> Bucket:
        return Bucket(1, 2, 2)

    def load(self, index: int, *, seed: int, epoch: int) -> Clip:
        self.store.read(index)
        return Clip(torch.zeros(3, 1, 2, 2), "", index, 8.0)


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    return lambda seconds: monkeypatch.setattr(stores, "_patience", seconds / 60)


@pytest.fixture
def store(patience: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> Store:
    """It has answered before; it is asked again every 50 ms, for 5 seconds."""
    patience(5)
    monkeypatch.setattr(stores, "wait_random_exponential", lambda **_: lambda state: 0.05)
    monkeypatch.setattr(stores, "_answered", {"http://store"})
    return Store()


@contextmanager
def soon(seconds: float = 2.0) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    return done


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 0), (0, 2), (2, 2)])
def test_a_run_waits_once_not_for_every_clip(
    workers: int, prefetch: int, store: Store, patience: Callable[[float], None]
) -> None:
    patience(0.3)
    loader = ClipLoader(Clips(store), global_batch=16, seed=0, workers=workers, prefetch=prefetch)
    with soon(), pytest.raises(StoreError, match=r"failed for 0\.005 minutes"):
        next(iter(loader))
    assert len(store.files) == max(1, workers)  # the other clips of the step are not even asked for


def test_a_loader_that_is_idle_when_it_is_interrupted_waits_no_more(store: Store) -> None:
    """Ctrl-C comes while a step is computed; a loader that is opened later waits."""
    store.down = False
    loader = ClipLoader(Clips(store), global_batch=2, seed=0, workers=0, prefetch=0)
    reading = iter(loader)
    next(reading)
    readers.release()
    next(reading)  # what can be read is
    store.down = True
    with soon(), pytest.raises(StoreError, match=INTERRUPTED):
        next(reading)
    later = in_thread(lambda: next(iter(loader)))
    time.sleep(0.3)
    store.down = False
    assert len(later.result(5)[0].video) == 2


def test_threads_that_decode_when_they_are_interrupted_read_on_without_waiting(store: Store) -> None:
    started = Event()

    def work(_: int) -> str:
        started.set()
        time.sleep(0.2)
        return store.read()

    with soon(), pytest.raises(KeyboardInterrupt), readers.threads(2) as pool:
        jobs = [pool.submit(work, number) for number in range(8)]
        started.wait()
        raise KeyboardInterrupt
    assert isinstance(jobs[0].exception(0), StoreError)
    assert jobs[-1].cancelled()


@pytest.mark.parametrize("how", ["a folder is opened", "an error in a pool", "a pool is left early"])
def test_others_wait_on(how: str, store: Store, tmp_path: Path, patience: Callable[[float], None]) -> None:
    patience(60)
    other = in_thread(store.read)
    store.asked.wait()
    if how == "a folder is opened":
        for number in range(3):
            (tmp_path / f"{number}.mp4").touch()
            (tmp_path / f"{number}.txt").write_text(f"clip {number}")
        assert len(read_manifest(str(tmp_path)).entries) == 3
    elif how == "an error in a pool":
        with pytest.raises(ValueError, match="any"), readers.threads(2):
            raise ValueError("any")
    else:
        assert next(readers.map_in_threads(str, range(9), 2)) == "0"
    time.sleep(0.2)
    assert not other.done()
    store.down = False
    assert other.result(5) == "content"


def test_readers_of_a_reader() -> None:
    """They end with it, not it with them; and a thread that has read for another reader is back at its own."""
    outer, helpers = readers.Reader(), readers.Helpers(1)
    with outer.at_work():
        inner, ended = readers.Reader(), readers.Reader()
        with inner.at_work():
            assert readers.current() is helpers.submit(readers.current).result() is inner
        assert readers.current() is helpers.submit(readers.current).result() is outer
    assert readers.current() not in (outer, inner)
    ended.set()
    assert not outer.is_set() and not inner.is_set()
    outer.set()
    assert inner.is_set() and not readers.current().is_set()
    with outer.at_work():
        assert readers.Reader().is_set()
    helpers.shutdown()


@pytest.mark.parametrize("end", ["release", "close"])
def test_shards_that_are_read_ahead_are_waited_for_no_longer_than_their_loader(
    end: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are not begun yet, too: the interpreter would not exit before."""
    monkeypatch.setattr(files, "copy", lambda *_: store.read())
    shards, loader = ShardFiles("http://store/video", 20, tmp_path), readers.Reader()
    with loader.at_work():
        shards.prefetch(range(6))
    store.asked.wait()
    with soon():
        readers.release() if end == "release" else loader.set()
        assert shards._pool is not None
        shards._pool.shutdown()


def test_a_shard_that_is_read_ahead_is_not_waited_for_twice(
    store: Store, tmp_path: Path, patience: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "copy", lambda *_: store.read())
    shards = ShardFiles("http://store/video", 20, tmp_path)
    shards.prefetch([0])
    store.asked.wait()
    patience(0.3)
    with soon(), pytest.raises(StoreError, match="failed for"):
        shards.tensor(0, "key")
