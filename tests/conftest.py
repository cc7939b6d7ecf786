"""Running the command line in this process, and a store on this machine that fails as it is told."""

import importlib.util
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape file names that are not UTF-8 in captured output, which pytest-xdist cannot send to its main process."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let processes that tests start keep their bytecode where Python may write none: compiling torch and the like
    anew in each of them takes longer than most tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        if sys.dont_write_bytecode and "PYTHONPYCACHEPREFIX" not in os.environ:
            patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
            patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.getbasetemp().parent / "bytecode"))
        yield


class Done(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str


@pytest.fixture
def stdit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Done]:
    """`stdit("sample", "a red circle")` in an empty folder, wide enough that lines don't wrap."""
    import torch  # not at the top: the packages' own tests run without the command line

    from stdit_cli.main import main

    torch.set_num_threads(1)
    for module in ("stdit_train.loss.batch", "stdit_train.loss.validation", "stdit_train.vae.vae_task"):
        monkeypatch.setattr(f"{module}.VALIDATION_CLIPS", 8)  # 64 take longer to encode than a few steps to train on
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # for this process, which has imported it

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["stdit", *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        assert isinstance(code, int)
        return Done(code, out, err)

    return run


@pytest.fixture
def captioner(tmp_path: Path) -> Callable[..., Path]:
    """`captioner("llava")`: the folder of a tiny captioner with random weights, of a family of `tiny_captioners`."""
    spec = importlib.util.spec_from_file_location("tiny_captioners", Path(__file__).with_name("tiny_captioners.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(family: str, **options: Any) -> Path:
        return module.make(tmp_path / family, family, **options)

    return make


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A cache of the Hub with what a test puts there, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(repo: str) -> Path:
        home, commit = tmp_path / f"models--{repo.replace('/', '--')}", "0" * 40
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(commit)
        (home / "snapshots" / commit).mkdir(parents=True)
        return home / "snapshots" / commit

    return put


Fault = Callable[[int, str], "int | str | None"]


class Store(ThreadingHTTPServer):
    """An HTTP server of a folder, with ranges.

    Attributes:
        fault: from the number of a request, from 0, and its path, to how it fails: a status, `reset`, `cut` (half of
            the body), or `hang`; None for not at all.
        requests: number of requests so far.
        failed: number of those that failed.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, folder))
        self.fault: Fault = lambda number, path: None
        self.requests = self.failed = 0
        self.lock = Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fail_for(self, seconds: float, how: int | str = 503) -> None:
        """Fail all requests from now on for some time."""
        until = time.monotonic() + seconds
        self.fault = lambda number, path: how if time.monotonic() < until else None

    def next_fault(self, path: str) -> int | str | None:
        with self.lock:
            fault = self.fault(self.requests, path)
            self.requests += 1
            self.failed += fault is not None
        return fault

    def handle_error(self, *_: object) -> None:
        """Say nothing of broken connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def __init__(self, folder: Path, *rest: Any) -> None:
        self.folder = folder
        super().__init__(*rest)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        fault = self.server.next_fault(self.path)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault == "hang":
            time.sleep(5)
        path = self.folder / self.path.lstrip("/")
        if isinstance(fault, int) or not path.exists():
            self.send_response(fault if isinstance(fault, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path.is_dir():
            names = (entry.name + "/" * entry.is_dir() for entry in sorted(path.iterdir()))
            data, kind = "".join(f'<a href="{name}">{name}</a>' for name in names).encode(), "text/html"
        else:
            data, kind = path.read_bytes(), "application/octet-stream"
        whole = len(data)
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or whole - 1), whole - 1)
            data = data[first : last + 1]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        self.send_header("Content-Type", kind)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
            self.close_connection = self.close_connection or fault == "cut"

    do_HEAD = do_GET


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Store]]:
    """Serve a folder while the test runs."""
    servers = []

    def start(folder: Path) -> Store:
        servers.append(Store(folder))
        Thread(target=partial(servers[-1].serve_forever, poll_interval=0.01), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
