"""What `stdit serve` takes and refuses, without its server."""

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from starlette.requests import Request

from stdit_cli.commands.sample.request import SEED_MAX, Settings
from stdit_cli.commands.serve.address import is_loopback, listen, shown
from stdit_cli.commands.serve.examples import EXAMPLES, example_files
from stdit_cli.commands.serve.form import Form, on_page
from stdit_cli.commands.serve.gate import POLICY, Gate
from stdit_cli.commands.serve.limits import Limits, Own
from stdit_data.datasets.shapes import COLOURS, SHAPES
from stdit_model.errors import UserError as ModelUserError
from stdit_train.errors import ConfigError, UserError
from stdit_train.evaluation.shape_reader import analyse

RED = "a red circle moving left"
OWN = Own(frames=16, height=64, width=64, steps=6, guidance=1.7)
LIMITS = Limits(None, None, None).over(OWN)


def ask(folder: Path, **fields: Any):
    return Form(**{"prompt": RED, **fields}).to_request(Settings(), LIMITS, folder)


def test_an_empty_form_is_the_checkpoint_s_own(tmp_path: Path) -> None:
    request = ask(tmp_path, negative=" ", seed=None, steps="", height=None)
    assert request.settings == Settings()
    assert (request.prompts[0].prompt, request.negative, request.seed) == (RED, None, 0)


def test_a_full_form(tmp_path: Path) -> None:
    picture = tmp_path / "first.png"
    Image.new("RGB", (8, 8)).save(picture)
    fields = {"seed": 7.0, "steps": 3, "guidance": 2, "frames": 8, "height": 32, "width": 48, "negative": "a bar"}
    request = ask(tmp_path, image={"path": str(picture)}, **fields)
    assert request.settings == Settings(frames=8, size="32x48", steps=3, guidance=2.0, image=str(picture.resolve()))
    assert (request.seed, request.negative) == (7, "a bar")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": None}, "prompt is empty"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "###"}, "no words left"),
        ({"prompt": "\ud800 circle"}, "not UTF-8"),
        ({"prompt": {"path": "/etc/passwd"}}, "prompt: expected a text"),
        ({"prompt": "x" * 1001}, "prompt: 1001 characters; at most 1000"),
        ({"negative": "x " * 700}, "negative prompt: 1399 characters"),
        ({"frames": 65}, "frames 65: expected a whole number from 1 to 64"),
        ({"frames": 0}, "frames 0"),
        ({"frames": 2.5}, "frames 2.5"),
        ({"frames": True}, "frames True"),
        ({"frames": "9" * 5000}, "frames 999"),
        ({"frames": [4]}, "frames [4]"),
        ({"height": 513, "width": 64}, "height 513: expected a whole number from 8 to 512"),
        ({"height": 64, "width": 4}, "width 4"),
        ({"height": 64}, "height and width"),
        ({"steps": 101}, "steps 101: expected a whole number from 1 to 100"),
        ({"steps": float("inf")}, "steps inf"),
        ({"guidance": float("nan")}, "guidance nan: expected a number from 0 to 30"),
        ({"guidance": -1}, "guidance -1"),
        ({"seed": SEED_MAX + 1}, "seed 9223372036854775808"),
        ({"seed": -1}, "seed -1"),
        ({"image": "/etc/passwd"}, "image: upload"),
        ({"image": {"path": "/etc/passwd"}}, "image: upload"),
        ({"image": {"path": "first.png"}}, "image: upload"),
        ({"image": {"path": "/x/\0.png"}}, "image: upload"),
        ({"image": {"path": None, "url": "data:image/png;base64,AAAA"}}, "image: upload"),
        ({"image": {"path": "https://example.org/x.png"}}, "image: upload"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_form_may_not_ask_for(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises((UserError, ModelUserError)) as caught:
        ask(tmp_path, **fields)
    line = on_page(str(caught.value))
    assert said in line
    assert len(line) < 200
    assert "--" not in line


def test_pictures_that_are_none_of_the_upload_folder(tmp_path: Path) -> None:
    inside = tmp_path / "uploads"
    inside.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "notes.txt").write_text("no picture")
    for path in (inside / ".." / "secret.png", inside / "link.png", inside / "notes.txt", inside):
        with pytest.raises(ConfigError, match="image"):
            ask(inside, image={"path": str(path)})


def test_limits_grow_with_the_checkpoint_unless_they_are_given() -> None:
    large = Own(frames=128, height=480, width=1024, steps=250, guidance=7.0)
    assert Limits(None, None, None).over(large) == Limits(128, 1024, 250)
    assert Limits(32, 256, 20).over(large) == Limits(32, 256, 20)
    assert Limits(None, None, None).over(OWN) == Limits()


def test_messages_on_the_page_are_words_without_markup() -> None:
    assert on_page("take a smaller --size or --low-memory") == "take a smaller size or low memory"
    assert on_page("unknown\n '<b>&'") == "unknown '&lt;b&gt;&amp;'"


def test_the_examples_show_their_prompts() -> None:
    names = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    for prompt, file in zip(EXAMPLES, example_files(), strict=True):
        frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(file))]
        seen = analyse(torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 127.5 - 1.0)
        assert (seen.colour, seen.shape) in names
        assert any(
            f"a {seen.colour} {seen.shape} {way}" == prompt for way in (f"moving {seen.motion}", "staying still")
        )
        assert Path(file).stat().st_size < 10_000


def answer(
    gate: Gate, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, list[tuple[bytes, bytes]]]:
    """The status and headers that a gate answers a request with."""
    sent: list[dict[str, Any]] = []
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    names = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": names}
    asyncio.run(gate(scope, receive, send))
    return sent[0]["status"], sent[0]["headers"]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """A gate before an application that answers everything it is asked with 200."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.mp4").write_bytes(b"video")
    (tmp_path / "own" / "link").symlink_to(tmp_path)

    async def app(scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["method"] == "POST" and not scope["path"].endswith("upload"):
            message = await receive()
            assert json.loads(message["body"]) is not None
            assert not message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return Gate(app, tmp_path / "own")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("GET", "/config", 200),
        ("GET", "/assets/index.js", 200),
        ("GET", "/assets/../../x", 404),
        ("GET", "/assets/..\\x", 404),
        ("GET", "/gradio_api/file={own}/a.mp4", 200),
        ("GET", "/gradio_api/file={own}/../secret", 403),
        ("GET", "/gradio_api/file={own}/link/secret", 403),
        ("GET", "/gradio_api/file=/etc/passwd", 403),
        ("GET", "/gradio_api/file=//etc/passwd", 403),
        ("GET", "/gradio_api/file=../../etc/passwd", 403),
        ("GET", "/gradio_api/file=etc/passwd", 403),
        ("GET", "/gradio_api/file=~/.ssh/id_rsa", 403),
        ("GET", "/gradio_api/file=file:///etc/passwd", 403),
        ("GET", "/gradio_api/file=https://example.org/", 403),
        ("GET", "/gradio_api/file=" + "/x" * 5000, 403),
        ("GET", "/gradio_api/file/etc/passwd", 404),
        ("GET", "/gradio_api/proxy=https://example.org/", 404),
        ("GET", "/gradio_api/deep_link", 404),
        ("GET", "/gradio_api/info", 404),
        ("GET", "/gradio_api/openapi.json", 404),
        ("GET", "/monitoring", 404),
        ("GET", "/docs", 404),
        ("POST", "/gradio_api/component_server", 404),
        ("POST", "/gradio_api/process_recording", 404),
        ("POST", "/gradio_api/vibe-code", 404),
        ("POST", "/gradio_api/call/make", 404),
        ("POST", "/gradio_api/upload", 200),
        ("PUT", "/gradio_api/upload", 405),
        ("OPTIONS", "/", 405),
    ],
)
def test_what_can_be_reached(gate: Gate, tmp_path: Path, method: str, path: str, status: int) -> None:
    assert answer(gate, method, path.format(own=tmp_path / "own"))[0] == status


def test_files_that_a_request_names(gate: Gate, tmp_path: Path) -> None:
    def join(data: Any) -> int:
        return answer(gate, "POST", "/gradio_api/queue/join", json.dumps({"data": data}).encode())[0]

    assert join([RED, None, 3]) == 200
    assert join([{"path": str(tmp_path / "own" / "a.mp4")}]) == 200
    for path in ("/etc/passwd", str(tmp_path / "own" / ".." / "x"), "https://example.org/x.png", "a.mp4", None, 3):
        assert join([RED, {"nested": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}]) == 403
    assert answer(gate, "POST", "/gradio_api/queue/join", b"junk")[0] == 400
    assert answer(gate, "POST", "/gradio_api/queue/join", b"[" * 100_000)[0] == 400
    assert answer(gate, "POST", "/gradio_api/queue/join", b'"' + b"x" * (1 << 20) + b'"')[0] == 413


def test_an_upload_that_breaks_off_is_no_error(tmp_path: Path) -> None:
    messages = iter([{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}])

    async def app(scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        await Request(scope, receive).body()
        raise AssertionError("read to the end")

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(message: dict[str, Any]) -> None: ...

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": []}
    asyncio.run(Gate(app, tmp_path)(scope, receive, send))
    assert list(messages) == []


def test_pages_from_elsewhere(gate: Gate) -> None:
    host = {"host": "127.0.0.1:7860"}
    status, headers = answer(gate, "GET", "/", headers=host)
    assert status == 200
    assert dict(headers)[b"content-security-policy"] == POLICY.encode()
    post = ("POST", "/gradio_api/queue/join", b"{}")
    assert answer(gate, *post, host | {"origin": "http://127.0.0.1:7860"})[0] == 200
    for origin in ("https://example.org", "null", "http://127.0.0.1:8000"):
        assert answer(gate, *post, host | {"origin": origin})[0] == 403


def test_the_address() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert shown(listener, "0.0.0.0") == shown(listener, "127.0.0.1") == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"--port {port} is taken"):
            listen("127.0.0.1", port)
    for host, said in (("203.0.113.1", "not an address of this machine"), ("no such host", "no such address")):
        with pytest.raises(ConfigError, match=said):
            listen(host, 0)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::")] == [True] * 3 + [
        False
    ] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./none"], "no checkpoint at ./none"),
        (["demo", "vae"], "vae is a VAE, not a pipeline"),
        (["--vae", "none/such"], "none/such"),
        (["--offload", "disk"], "--offload disk: choose model"),
        (["--host", "203.0.113.1"], "not an address of this machine"),
    ],
)
def test_one_line_for_what_cannot_be_served(stdit: Callable, arguments: list[str], said: str) -> None:
    from stdit_train.assets import demo_folder

    Path("vae").symlink_to(demo_folder() / "vae")
    done = stdit("serve", "--port", 0, *arguments)
    assert done.code == 2, done
    assert len(done.err.strip().splitlines()) == 1
    assert said in done.err


def test_a_taken_port_and_a_missing_extra(stdit: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = stdit("serve", "--port", port)
        assert (done.code, done.out) == (2, "")
        assert done.err == f"stdit: --port {port} is taken: stop what listens there, or choose another port\n"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = stdit("serve")
    assert done.code == 2
    assert done.err == "stdit: stdit serve needs Gradio: run `uv sync --extra web`, or pip install 'stdit-cli[web]'\n"
