"""Stores that fail: what passes is waited for, what lasts is told at once, and neither is taken for the other."""

from __future__ import annotations

import errno
import logging
import random
import socket
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stdit_data.buckets import Bucket
from stdit_data.datasets.videos import open_videos
from stdit_data.errors import ClipError, FileError, MissingFileError, StoreError
from stdit_data.latents.encode import VideoEncoder, manifest_metadata, video_job
from stdit_data.latents.format import read_index
from stdit_data.loading.loader import Batch, ClipLoader
from stdit_data.manifests.format import Entry, read_manifest, write_manifest
from stdit_data.manifests.validate import good_entries, validate
from stdit_data.storage import files, listing, readers, stores

aiohttp = pytest.importorskip("aiohttp")

SHAPE: dict[str, Any] = {"frames": 4, "height": 32, "width": 32}
CLIPS = 8


@pytest.fixture(scope="module")
def clips(encode_clip: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of equal length, a manifest of them, and a zip of all."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(CLIPS):
        encode_clip(folder / f"{number}.mp4", frames=14 + number)
        (folder / f"{number}.txt").write_text(f"clip {number}")
    write_manifest(f"{folder}/set.csv", [Entry(f"{number}.mp4", f"clip {number}") for number in range(CLIPS)])
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(CLIPS):
            archive.write(folder / f"{number}.mp4", f"{number}.mp4")
            archive.write(folder / f"{number}.txt", f"{number}.txt")
    return folder


@pytest.fixture
def store(clips: Path, serve: Callable[[Path], Any]) -> Any:
    return serve(clips)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Wait for so many seconds; 20 by default."""

    def set_seconds(seconds: float) -> None:
        monkeypatch.setattr(stores, "_patience", seconds / 60)

    set_seconds(20)
    return set_seconds


def response_error(status: int) -> Exception:
    return aiohttp.ClientResponseError(SimpleNamespace(real_url="x"), (), status=status)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class HttpError(Exception):
    """As gcsfs and botocore tell of a status."""

    def __init__(self, code: int | None = None, response: object = None) -> None:
        self.code, self.response = code, response


def boto(status: int) -> HttpError:
    return HttpError(response={"ResponseMetadata": {"HTTPStatusCode": status}})


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (response_error(500), True),
        (response_error(503), True),
        (response_error(429), True),
        (response_error(408), True),
        (response_error(501), False),
        (response_error(404), False),
        (response_error(403), False),
        (caused(FileNotFoundError("x"), response_error(503)), True),
        (caused(FileNotFoundError("x"), TimeoutError()), True),
        (caused(FileNotFoundError("x"), response_error(403)), False),
        (caused(FileNotFoundError("x"), FileNotFoundError("x")), False),
        (FileNotFoundError("x"), False),
        (PermissionError("x"), False),
        (HttpError(503), True),
        (HttpError(401), False),
        (boto(503), True),
        (boto(400), False),
        (caused(OSError(errno.EIO, "an error without a name of its own"), boto(502)), True),
        (OSError(errno.EBUSY, "SlowDown"), True),
        (OSError(errno.EIO, "disk"), False),
        (OSError(errno.ECONNRESET, "reset"), True),
        (HttpError(response=SimpleNamespace(status_code=504)), True),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError("half"), True),
        (aiohttp.InvalidURL("x"), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (zlib.error("damaged"), False),
        (zipfile.BadZipFile("damaged"), False),
        (ValueError("a bug"), False),
        (StoreError("waited for"), False),
        (ClipError("x", "no frame decodes"), False),
    ],
)
def test_passing_faults_are_told_from_lasting_ones(error: Exception, passing: bool) -> None:
    assert stores.is_passing(error) is passing


@pytest.mark.parametrize("how", [503, 429, "reset", "cut", "hang"])
@pytest.mark.parametrize("archive", [False, True])
def test_a_clip_is_read_as_if_nothing_had_failed(
    how: int | str, archive: bool, store: Any, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "TIMEOUT", 0.2)
    source = f"zip://::{store.url}/set.zip?{how}" if archive else f"{store.url}/set.csv"
    store.fault = lambda number, path: how if number % 3 == 1 else None
    read = open_videos(source.split("?")[0], **SHAPE).load(2, seed=0, epoch=0)
    assert store.failed > 1
    assert torch.equal(read.video, open_videos(clips, **SHAPE).load(2, seed=0, epoch=0).video)


def test_a_listing_and_questions_wait_too(store: Any) -> None:
    numbers = random.Random(0)
    store.fault = lambda number, path: 503 if numbers.random() < 0.4 else None
    assert listing.walk(store.url) == sorted([f"{n}.{kind}" for n in range(CLIPS) for kind in ("mp4", "txt")] + OTHERS)
    assert files.is_folder(store.url)
    assert files.exists(f"{store.url}/3.mp4")
    assert not files.exists(f"{store.url}/none.mp4")
    assert files.size(f"{store.url}/3.txt") == len("clip 3")


OTHERS = ["set.csv", "set.zip"]


@pytest.mark.parametrize(
    ("status", "kind", "words"), [(404, MissingFileError, "no such file"), (403, FileError, "403")]
)
def test_a_lasting_fault_is_told_at_once(status: int, kind: type, words: str, store: Any) -> None:
    assert files.exists(f"{store.url}/0.mp4")
    store.fault = lambda number, path: status
    started = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
        files.read_text(f"{store.url}/0.txt")
    assert not isinstance(caught.value, StoreError)
    assert time.monotonic() - started < 2


def steps(source: str, count: int, rejects: Path) -> list[Batch]:
    loader = ClipLoader(open_videos(source, **SHAPE), global_batch=4, seed=3, rejects=rejects, max_reject_share=0.0)
    found = []
    for batches in loader:
        found += batches
        if len(found) == count:
            loader.close()
            break
    return found


@pytest.mark.parametrize("fault", ["1 %", "outage"])
def test_a_flaky_store_changes_no_batch(fault: str, store: Any, clips: Path, tmp_path: Path) -> None:
    if fault == "outage":
        store.fault = lambda number, path: store.fail_for(2, "reset") if number == 60 else None  # type: ignore[func-returns-value]
    else:
        store.fault = lambda number, path: 503 if number % 100 == 50 else None
    found = steps(f"{store.url}/set.csv", 12, tmp_path / "rejects.jsonl")
    assert store.failed
    for ours, theirs in zip(found, steps(str(clips), 12, tmp_path / "rejects.jsonl"), strict=True):
        assert ours.indices == theirs.indices
        assert torch.equal(ours.video, theirs.video)
    assert not (tmp_path / "rejects.jsonl").exists()


def test_a_store_that_stays_away_is_no_rejected_clip(
    store: Any, tmp_path: Path, patience: Callable[[float], None]
) -> None:
    dataset = open_videos(f"{store.url}/set.csv", **SHAPE)
    patience(0.5)
    loader = ClipLoader(dataset, global_batch=4, seed=0, rejects=tmp_path / "rejects.jsonl")
    reading = iter(loader)
    next(reading)
    position = loader.state_dict()
    store.fault = lambda number, path: 503
    with pytest.raises(StoreError, match=r"mp4: the store failed for .* minutes \(HTTP 503\); try again later"):
        while True:
            position = loader.state_dict()
            next(reading)
    assert loader.state_dict() == position
    assert not (tmp_path / "rejects.jsonl").exists()


def test_a_wrong_address_is_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_PATIENCE", 0.3 / 60)
    monkeypatch.setattr(stores, "_answered", set())  # the server of another test may have had this port
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(StoreError, match=rf"^http://127.0.0.1:{port}/set.csv: the store failed for"):
        read_manifest(f"http://127.0.0.1:{port}/set.csv")
    assert time.monotonic() - started < 5


def test_waiting_is_logged_once_and_can_be_ended(
    store: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stores, "QUIET", 0.05)
    assert files.exists(f"{store.url}/0.mp4")
    store.fault = lambda number, path: 503
    errors: list[Exception] = []

    def read() -> None:
        try:
            files.read_text(f"{store.url}/0.txt")
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=read) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        time.sleep(1)
        readers.release()
        for thread in threads:
            thread.join(2)
        assert [str(error) for error in errors] == [
            f"{store.url}/0.txt: the store failed until it was interrupted (HTTP 503); try again later"
        ] * 2
        store.fault = lambda number, path: None
        assert files.read_text(f"{store.url}/0.txt") == "clip 0"
    assert [message for message in caplog.messages if store.url in message] == [
        f"{store.url} fails (HTTP 503); trying again for 0.333333 minutes",
        f"{store.url} answers again",
    ]


@pytest.mark.parametrize("stop", ["release", "close"])
def test_a_loader_that_is_to_stop_waits_no_more(store: Any, patience: Callable[[float], None], stop: str) -> None:
    """What its threads go on to read is not waited for either."""
    patience(60)
    dataset = open_videos(f"{store.url}/set.csv", **SHAPE, interval=1)
    threads = {thread.ident for thread in threading.enumerate()}
    loader = ClipLoader(dataset, global_batch=2, seed=0, workers=2, prefetch=3)
    reading = iter(loader)
    next(reading)
    store.fault = lambda number, path: 503
    before = store.failed
    while store.failed < before + 2:
        time.sleep(0.05)
    started = time.monotonic()
    if stop == "release":
        readers.release()
        with pytest.raises(StoreError, match="until it was interrupted"):
            for _ in reading:
                pass
    loader.close()
    while any(thread.name.endswith("(_apply_udf)") for thread in threading.enumerate() if thread.ident not in threads):
        assert time.monotonic() - started < 10
        time.sleep(0.05)


def test_validation_calls_no_clip_bad_that_its_store_fails_for(store: Any, patience: Callable[[float], None]) -> None:
    manifest = read_manifest(f"{store.url}/set.csv")
    store.fault = lambda number, path: 503 if number % 10 == 3 else None
    report = validate(manifest, workers=2)
    assert store.failed
    assert not report.bad and len(good_entries(manifest, report)) == CLIPS
    patience(0.3)
    store.fault = lambda number, path: 503 if "5.mp4" in path else None
    with pytest.raises(StoreError, match=r"/5.mp4: the store failed"):
        validate(manifest, workers=2)
    store.fault = lambda number, path: 404 if "5.mp4" in path else None
    assert [finding.problems for finding in validate(manifest, workers=2).bad] == [["no such file"]]


def test_buckets_are_not_chosen_without_the_clips(store: Any, patience: Callable[[float], None]) -> None:
    assert files.exists(f"{store.url}/0.mp4")
    patience(0.3)
    store.fault = lambda number, path: 503 if "5.mp4" in path else None
    with pytest.raises(StoreError, match=r"/5.mp4: the store failed"):
        open_videos(f"{store.url}/set.csv", buckets=[Bucket(4, 32, 32), Bucket(4, 32, 48)])


def test_a_shard_with_a_passing_fault_is_not_finished(
    store: Any, tmp_path: Path, patience: Callable[[float], None]
) -> None:
    dataset = open_videos(f"{store.url}/set.csv", **SHAPE)

    def encode(video: torch.Tensor) -> torch.Tensor:
        return torch.cat([video[:, :1]] * 2, dim=1)

    encoder = VideoEncoder(encode, lambda bucket: (1, *bucket), {"source": "test", "hash": "0", "scale": 1.0})

    def job() -> Any:
        about = manifest_metadata("set.csv", dataset)
        return video_job(dataset, f"{tmp_path}/cache", encoder, {}, about, shard_bytes=4 * 2 * 4 * 32 * 32 * 2)

    patience(0.3)
    store.fault = lambda number, path: 503 if "5.mp4" in path else None
    with pytest.raises(StoreError, match=r"/5.mp4: the store failed"):
        job().run()
    assert [path.name for path in (tmp_path / "cache/video").glob("*.safetensors")] == ["00000.safetensors"]
    store.fault = lambda number, path: 404 if "4.mp4" in path else None
    assert job().run()
    rows = read_index(f"{tmp_path}/cache", "video").to_pylist()
    assert {row["sample"]: row["reason"] for row in rows} == dict.fromkeys(range(8)) | {4: "no such file"}


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b", "s3fs", "s3"), ("gs://b", "gcsfs", "gs"), ("https://h", "aiohttp", "https")],
)
def test_a_missing_package_names_the_command_that_installs_it(
    url: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    write_manifest(f"{tmp_path}/set.csv", [Entry(f"{url}/a.mp4", "a")])
    words = rf"^{url}/a.mp4: .*; install it: uv sync --extra {extra}, or pip install stdit-data\[{extra}\]$"
    with pytest.raises(StoreError, match=words):
        validate(read_manifest(f"{tmp_path}/set.csv"))
    with pytest.raises(StoreError, match=words):
        next(iter(ClipLoader(open_videos(f"{tmp_path}/set.csv", **SHAPE), global_batch=1, seed=0)))
