"""Reading and writing through s3fs, at a server of moto on this machine that fails as it is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from threading import Lock, Thread
from typing import Any

import fsspec
import pytest
import torch

from stdit_data.datasets.videos import open_videos
from stdit_data.errors import ClipError, DataError, FileError, MissingFileError, StoreError
from stdit_data.latents.dataset import LatentDataset
from stdit_data.latents.encode import VideoEncoder, manifest_metadata, video_job
from stdit_data.loading.loader import ClipLoader
from stdit_data.manifests.format import Entry, read_manifest, write_manifest
from stdit_data.manifests.validate import validate
from stdit_data.storage import atomic, files, listing, stores

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
serving = pytest.importorskip("werkzeug.serving")

SHAPE: dict[str, Any] = {"frames": 4, "height": 32, "width": 32}
CLIPS = 6
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class S3:
    """A server of moto's S3 behind one that may fail.

    Attributes:
        fault: from the number of a request, from 0, and its path, to the body of a failure; None for an answer.
        requests: method and path of each request.
        failed: number of requests that failed.
    """

    def __init__(self) -> None:
        self.answer, self.lock = moto.DomainDispatcherApplication(moto.create_backend_app), Lock()
        self.reset()

    def reset(self) -> None:
        self.fault: Callable[[int, str], bytes | None] = lambda number, path: None
        self.requests: list[tuple[str, str]] = []
        self.failed = 0

    def __call__(self, environ: Any, start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        with self.lock:
            body = self.fault(len(self.requests), path)
            self.requests.append((environ["REQUEST_METHOD"], path))
            self.failed += body is not None
        if body is None:
            return self.answer(environ, start_response)
        start_response("503 Slow Down" if body == SLOW_DOWN else "403 Forbidden", [("Content-Type", "text/xml")])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


class Quiet(serving.WSGIRequestHandler):
    def log(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[S3, str]]:
    app = S3()
    running = serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield app, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.fixture(scope="module")
def local(encode_clip: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips with their captions, and a manifest of them."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(CLIPS):
        encode_clip(folder / f"{number}.mp4", frames=14 + number)
        (folder / f"{number}.txt").write_text(f"clip {number}")
    write_manifest(f"{folder}/set.csv", [Entry(f"{number}.mp4", f"clip {number}") for number in range(CLIPS)])
    return folder


@pytest.fixture
def s3(server: tuple[S3, str], local: Path, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server with a bucket that holds the folder; s3fs and botocore fail at the first failure."""
    app, url = server
    settings = {
        "endpoint_url": url,
        "key": "key",
        "secret": "secret",
        "config_kwargs": {"retries": {"total_max_attempts": 1}},
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(stores, "_patience", 20 / 60)
    app.reset()
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    if not store.exists("bucket"):
        store.mkdir("bucket")
        for path in local.iterdir():
            atomic.write_bytes(f"s3://bucket/clips/{path.name}", path.read_bytes())
    app.reset()
    return app


def now_and_then(number: int, path: str) -> bytes | None:
    """Fail at every fifth request or so, without a beat that retries could fall into."""
    return SLOW_DOWN if Random(200 + number).random() < 0.2 else None


@pytest.mark.parametrize("source", ["clips", "clips/set.csv"])
@pytest.mark.parametrize("slow", [False, True])
def test_clips_and_captions_are_read_as_from_a_disk(source: str, slow: bool, s3: S3, local: Path) -> None:
    if slow:
        s3.fault = now_and_then
    found = open_videos(f"s3://bucket/{source}", **SHAPE)
    expected = open_videos(str(local), **SHAPE)
    assert list(found.entries) == list(expected.entries)
    assert found.identity == expected.identity
    ours, theirs = (iter(ClipLoader(data, global_batch=3, seed=0, max_reject_share=0.0)) for data in (found, expected))
    for _ in range(2):
        (a,), (b,) = next(ours), next(theirs)
        assert a.indices == b.indices and a.captions == b.captions
        assert torch.equal(a.video, b.video)
    assert (s3.failed > 2) is slow


def test_a_folder_costs_a_listing_and_one_request_for_each_caption(s3: S3) -> None:
    manifest = read_manifest("s3://bucket/clips")
    assert [entry.caption for entry in manifest.entries] == [f"clip {number}" for number in range(CLIPS)]
    assert sorted(s3.requests) == [("GET", "/bucket")] + [("GET", f"/bucket/clips/{n}.txt") for n in range(CLIPS)]


def test_a_file_is_written_by_one_request(s3: S3) -> None:
    atomic.write_bytes("s3://bucket/new/folder/a.txt", b"whole")
    assert s3.requests == [("PUT", "/bucket/new/folder/a.txt")]
    assert files.read_text("s3://bucket/new/folder/a.txt") == "whole"


def encode(data: Any, out: str) -> None:
    encoder = VideoEncoder(
        lambda video: torch.cat([video[:, :1], -video[:, :1]], dim=1),
        lambda bucket: (1, *bucket),
        {"source": "test", "hash": "0", "scale": 1.0},
    )
    about = manifest_metadata("set.csv", data)
    assert video_job(data, out, encoder, {}, about, shard_bytes=2 * 4 * 32 * 32 * 2 * 2).run()


def test_a_cache_is_written_and_read(s3: S3, local: Path, tmp_path: Path) -> None:
    s3.fault = now_and_then
    encode(open_videos(f"{local}/set.csv", **SHAPE), f"{tmp_path}/cache")
    encode(open_videos("s3://bucket/clips/set.csv", **SHAPE), "s3://bucket/cache")
    assert s3.failed > 5
    assert sorted(listing.names("s3://bucket/cache/video")) == sorted(listing.names(f"{tmp_path}/cache/video"))
    ours, theirs = (
        iter(ClipLoader(LatentDataset(url, window=2, copies=tmp_path / "copies"), global_batch=3, seed=0))
        for url in ("s3://bucket/cache", f"{tmp_path}/cache")
    )
    for _ in range(4):
        (a,), (b,) = next(ours), next(theirs)
        assert a.indices == b.indices and torch.equal(a.video, b.video)


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (lambda: files.read_text("s3://bucket/none.txt"), MissingFileError, "s3://bucket/none.txt: no such file"),
        (lambda: files.read_text("s3://none/a.txt"), MissingFileError, "s3://none/a.txt: no such file"),
        (lambda: read_manifest("s3://bucket/none.csv"), DataError, "s3://bucket/none.csv: no such manifest"),
        (lambda: read_manifest("s3://bucket/none"), DataError, "s3://bucket/none: no such folder or manifest"),
        (lambda: LatentDataset("s3://bucket/none"), DataError, "s3://bucket/none: no video part; make it with"),
    ],
)
def test_what_is_missing_is_told_at_once(act: Callable[[], Any], kind: type, words: str, s3: S3) -> None:
    started = time.monotonic()
    with pytest.raises(kind, match=f"^{words}") as caught:
        act()
    assert not isinstance(caught.value, StoreError) and "\n" not in str(caught.value)
    assert time.monotonic() - started < 5


def test_a_missing_clip_is_an_unreadable_one(s3: S3) -> None:
    write_manifest("s3://bucket/two.csv", [Entry("clips/0.mp4", "a"), Entry("clips/none.mp4", "b")])
    assert [finding.problems for finding in validate(read_manifest("s3://bucket/two.csv")).findings] == [
        [],
        ["no such file"],
    ]
    with pytest.raises(ClipError, match=r"^s3://bucket/clips/none.mp4: no such file$"):
        open_videos("s3://bucket/two.csv", **SHAPE).load(1, seed=0, epoch=0)


def test_access_that_is_denied_is_told_at_once(s3: S3) -> None:
    s3.fault = lambda number, path: DENIED
    with pytest.raises(FileError, match=r"^s3://bucket/clips/0.txt: ") as caught:
        files.read_text("s3://bucket/clips/0.txt")
    assert not isinstance(caught.value, (StoreError, MissingFileError)) and "\n" not in str(caught.value)
    assert s3.failed == 1


def test_a_store_that_stays_slow_is_no_unreadable_clip(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_videos("s3://bucket/clips", **SHAPE)
    monkeypatch.setattr(stores, "_patience", 0.5 / 60)
    s3.fault = lambda number, path: SLOW_DOWN
    with pytest.raises(StoreError, match=r"^s3://bucket/clips/0.mp4: the store failed for .*; try again later$"):
        data.load(0, seed=0, epoch=0)
    assert s3.failed > 1
