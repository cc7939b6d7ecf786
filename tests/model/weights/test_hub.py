"""The Hub by a loopback address: one that refuses, is silent, or answers, and never the real one."""

import logging
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from stdit_model import STDiT
from stdit_model.errors import WeightsError, reason
from stdit_model.weights import hub


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Set the Hub's address, with an empty cache."""
    hub._ask.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return lambda url: monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)


@pytest.fixture
def port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refusing_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]  # closed again


@pytest.fixture
def broken_server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def refusal(caplog: pytest.LogCaptureFixture) -> str:
    """The message for a model on the Hub, which must come within seconds and be all that is said."""
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(WeightsError) as caught:
        STDiT.from_pretrained("nobody/nothing")
    assert time.monotonic() - started < 8
    assert caplog.records == []
    assert "\n" not in str(caught.value)
    assert "Errno" not in str(caught.value)
    return str(caught.value)


def test_a_hub_that_refuses(endpoint: Callable, caplog: pytest.LogCaptureFixture) -> None:
    url = f"http://127.0.0.1:{refusing_port()}"
    endpoint(url)
    assert f"not in the cache, and {url} cannot be reached (Connection refused)" in refusal(caplog)


def test_a_hub_that_is_silent(
    endpoint: Callable, port: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    endpoint(f"http://127.0.0.1:{port}")
    assert f"http://127.0.0.1:{port} cannot be reached" in refusal(caplog)


def test_a_hub_that_is_out_of_order(endpoint: Callable, broken_server: str, caplog: pytest.LogCaptureFixture) -> None:
    endpoint(broken_server)
    assert "HTTP status 503" in refusal(caplog)


def test_without_the_hub_the_cache_is_enough(
    endpoint: Callable, hub_cache: Callable, tiny: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny().save_pretrained(hub_cache("someone/model"))
    endpoint(f"http://127.0.0.1:{refusing_port()}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # True by hub_cache
    assert STDiT.from_pretrained("someone/model").config.depth == 2


def test_offline_by_choice_nothing_is_asked(endpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_ask", lambda *_: pytest.fail("the Hub was asked"))
    assert hub.unreachable() == "HF_HUB_OFFLINE is set"
    assert hub.hub_options() == {"local_files_only": True}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/x"), "Permission denied"),
        (RuntimeError("no: [Errno 111] Connection refused.\nmore"), "no: Connection refused"),
        (ValueError(""), "ValueError"),
    ],
)
def test_reasons_are_short_and_without_numbers(error: Exception, said: str) -> None:
    assert reason(error) == said
