"""The page of `stdit serve`, asked by plain HTTP over the loopback, and used in a headless Chromium."""

import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from stdit_cli.commands.sample.generate import VideoGenerator
from stdit_cli.commands.sample.outputs import slug
from stdit_cli.commands.sample.request import Settings
from stdit_cli.commands.serve.examples import EXAMPLES, example_files
from stdit_cli.commands.serve.limits import Limits
from stdit_cli.commands.serve.maker import Maker
from stdit_cli.commands.serve.server import make_app, make_server
from stdit_data.datasets.shapes import Triple
from stdit_data.video.read import read_video
from stdit_train.assets import demo_folder
from stdit_train.evaluation.shape_reader import analyse
from stdit_train.pipeline.find import find_checkpoint

RED = "a red circle moving left"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@dataclass
class Site:
    """A server that runs, and what is needed to talk to it as its page does."""

    port: int
    folder: Path
    events: dict[str, dict[str, Any]]  # what Gradio calls dependencies, by the name of their function

    @classmethod
    def at(cls, port: int, folder: Path) -> "Site":
        site = cls(port, folder, {})
        _, config = site.ask("GET", "/config")
        site.events = {event["api_name"]: event for event in json.loads(config)["dependencies"]}
        return site

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()

    def post(self, path: str, content: dict[str, Any]) -> tuple[int, Any]:
        kind = {"content-type": "application/json"}
        status, answer = self.ask("POST", f"/gradio_api/{path}", json.dumps(content).encode(), kind)
        return status, json.loads(answer) if answer.startswith((b"{", b"[")) else answer

    def form(self, **fields: Any) -> list[Any]:
        """The values of the form's fields in their order."""
        values = {"prompt": RED, "negative": "", "checkpoint": "demo", "image": None, "seed": 0, "steps": 1}
        values |= {"guidance": 1.7, "frames": 1, "height": 64, "width": 64}
        return list((values | fields).values())

    def join(self, name: str, data: list[Any]) -> tuple[int, str, Any]:
        """Queue an event; returns the status, its session, and the answer."""
        session = secrets.token_hex(5)
        content = {"data": data, "fn_index": self.events[name]["id"], "session_hash": session}
        return *(answer := self.post("queue/join", content))[:1], session, answer[1]

    def listen(self, path: str) -> http.client.HTTPResponse:
        """What the server sends as long as the page is open."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=240)
        connection.request("GET", f"/gradio_api/{path}")
        return connection.getresponse()

    def wait(self, session: str, kind: str = "process_completed") -> dict[str, Any]:
        """The first message of a kind on an event; by default its last one."""
        for line in self.listen(f"queue/data?session_hash={session}"):
            if line.startswith(b"data: ") and (message := json.loads(line[6:]))["msg"] == kind:
                return message
        raise AssertionError("no answer")

    def make(self, **fields: Any) -> dict[str, Any]:
        status, session, answer = self.join("make", self.form(**fields))
        assert status == 200, answer
        return self.wait(session)

    def read(self, path: str) -> bytes:
        status, content = self.ask("GET", f"/gradio_api/file={path}")
        assert status == 200
        return content

    def upload(self, name: str, content: bytes) -> str:
        body = f'--x\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        kind = {"content-type": "multipart/form-data; boundary=x"}
        status, answer = self.ask("POST", "/gradio_api/upload", body + content + b"\r\n--x--\r\n", kind)
        assert status == 200
        return json.loads(answer)[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The page of the demo, in this process, which connects to nothing but itself."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("serve")
    sources = {"demo": find_checkpoint(str(demo_folder()))}
    connect, outside = socket.socket.connect, []

    def watched(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            outside.append(address)
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE"):
            patch.setenv(name, "")  # restored afterwards
        patch.setattr("socket.socket.connect", watched)
        app, end = make_app(Maker(sources, Settings(), folder), Limits(None, None, None), "127.0.0.1")
        server = make_server(app, end)
        thread = Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield Site.at(listener.getsockname()[1], folder)
        end()
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert outside == []


def test_no_file_can_be_read(site: Site, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    for path in (
        "/etc/passwd",
        secret,
        f"{site.folder}/../{secret.relative_to(secret.parents[1])}",
        "../../x",
        "setup.py",
    ):
        for address in (f"/gradio_api/file={path}", f"/gradio_api/file/{path}", f"/file={path}", f"/assets/{path}"):
            assert site.ask("GET", address)[0] in (403, 404), address
    assert site.ask("GET", "/gradio_api/file=%2Fetc%2Fpasswd")[0] == 403
    assert site.ask("GET", "/assets/..%2f..%2fpackage.json")[0] == 404
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    for fields in ({"image": file}, {"prompt": file}, {"image": {**file, "path": "http://127.0.0.1:1/x.png"}}):
        assert site.join("make", site.form(**fields))[0] == 403
    assert not any(path.read_bytes() == b"the secret" for path in site.folder.rglob("*") if path.is_file())
    assert site.ask("GET", "/", headers={"host": "example.org"})[0] == 400
    path = site.upload("../../../up.txt", b"mine")
    assert Path(path).resolve().is_relative_to(site.folder)
    assert site.read(path) == b"mine"


def test_gradio_itself_refuses_files_that_were_not_uploaded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stdit_cli.commands.serve.gate._paths", lambda content: [])
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    assert site.make(prompt=file)["success"] is False
    assert not any(path.name == "passwd" for path in site.folder.rglob("*"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"frames": 1000}, "frames 1000: expected a whole number from 1 to 64"),
        ({"prompt": "x" * 2000}, "prompt: 2000 characters; at most 1000 are allowed here"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"checkpoint": "/etc"}, "checkpoint /etc: choose demo"),
        ({"image": b"junk"}, "first.png"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_are_one_line(site: Site, fields: dict[str, Any], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    if "image" in fields:
        path = site.upload("first.png", fields["image"])
        fields = {"image": {"path": path, "meta": {"_type": "gradio.FileData"}}, "frames": 4}
    message = site.make(**fields)
    assert message["success"] is False
    assert said in message["output"]["error"]
    assert "Traceback" not in json.dumps(message)
    assert capfd.readouterr().err == ""


def test_an_example_fills_in_the_whole_form(site: Site) -> None:
    chosen = {"index": 2, "value": EXAMPLES[2], "selected": True}
    content = {"data": [], "fn_index": site.events["choose"]["id"], "session_hash": "x", "event_data": chosen}
    status, answer = site.post("run/predict", content)
    assert status == 200, answer
    assert answer["data"][:5] == [EXAMPLES[2], "", "demo", None, 0]
    assert [field["value"] for field in answer["data"][5:]] == [6, 1.7, 16, 64, 64]


def files_of(message: dict[str, Any]) -> tuple[str, str, str]:
    """Paths of the video, the sidecar and the contact sheet of a finished request."""
    assert message["success"], message
    *_, video, sidecar, sheet, _ = message["output"]["data"]
    return tuple(update["value"]["path"] for update in (video, sidecar, sheet))


def test_the_same_as_the_command_makes(site: Site, stdit: Callable, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "first.png")
    uploaded = site.upload("first.png", (tmp_path / "first.png").read_bytes())
    fields = {"frames": 2, "steps": 2, "seed": 3, "negative": "a bar", "guidance": 2.5, "height": 48}
    video, sidecar, sheet = files_of(
        site.make(image={"path": uploaded, "meta": {"_type": "gradio.FileData"}}, **fields)
    )
    options = ["--frames", 2, "--steps", 2, "--seed", 3, "--negative", "a bar", "--guidance", 2.5, "--size", "48x64"]
    done = stdit("sample", RED, *options, "--image", "first.png")
    assert done.code == 0, done.err
    [name] = (path.name for path in Path("videos").glob("*.mp4"))
    assert Path(video).name == name
    assert Path(sheet).name == "contact-sheet.png"
    assert site.read(video) == (Path("videos") / name).read_bytes()
    made, expected = json.loads(site.read(sidecar)), json.loads((Path("videos") / f"{name}.json").read_text())
    assert expected["settings"].pop("image") == str(tmp_path / "first.png")
    assert made["settings"].pop("image") == "first.png"
    assert made == expected
    assert str(site.folder) not in site.read(sidecar).decode()


def test_one_job_at_a_time_and_cancelling(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    make, lock, begun, going = VideoGenerator.make, Lock(), Event(), Event()

    def watched(self: VideoGenerator, *arguments: Any) -> Any:
        assert lock.acquire(blocking=False), "two at once"
        begun.set()
        going.wait(60)
        try:
            return make(self, *arguments)
        finally:
            lock.release()

    monkeypatch.setattr(VideoGenerator, "make", watched)
    sessions = [site.join("make", site.form(steps=steps))[1] for steps in (100, 1, 1)]
    assert begun.wait(60)
    direct = {"data": site.form(), "fn_index": site.events["make"]["id"], "session_hash": "direct"}
    assert site.post("run/predict", direct)[0] == 404  # past the queue
    stop = {"data": [], "fn_index": site.events["stop"]["id"], "session_hash": sessions[0]}
    assert site.post("run/predict", stop)[0] == 200
    going.set()
    started = time.monotonic()
    assert all(update["__type__"] == "update" for update in site.wait(sessions[0])["output"]["data"])
    for session in sessions[1:]:
        files_of(site.wait(session))
    assert time.monotonic() - started < 60


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install chromium, chromium-browser or google-chrome")
def test_in_a_browser(site: Site, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    hosts = set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(90_000)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(f"http://127.0.0.1:{site.port}")
        page.locator("#examples img").first.wait_for()
        page.locator("#prompt textarea").fill("a green triangle moving right")
        page.locator("#generate").click()
        for name in ("video", "sidecar"):
            page.locator(f"#get-{name}").wait_for()
            with page.expect_download() as download:
                page.locator(f"#get-{name}").click()
            download.value.save_as(tmp_path / download.value.suggested_filename)
        sizes = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        page.locator("#examples button").nth(2).click()
        page.wait_for_function("document.querySelector('#prompt textarea').value === 'a blue triangle moving right'")
        page.locator("#prompt textarea").fill("###")
        page.locator("#generate").click()
        toast = page.get_by_test_id("toast-body").inner_text()
        page.locator("#generate").wait_for()  # in the place of Cancel again
        browser.close()
    assert hosts == {f"127.0.0.1:{site.port}"}
    assert sizes[0] <= sizes[1]  # nothing to scroll sideways on a phone
    assert "no words left" in toast
    assert "Traceback" not in toast
    video, fps = read_video(str(tmp_path / "a-green-triangle-moving-right-0.mp4"), 64, 64)
    assert (video.shape[1], fps) == (16, 8)
    assert analyse(video).matches(Triple("green", "triangle", "right"))["all"]
    sidecar = json.loads((tmp_path / "a-green-triangle-moving-right-0.mp4.json").read_text())
    assert (sidecar["prompt"], sidecar["seed"]) == ("a green triangle moving right", 0)
    assert (sidecar["settings"]["steps"], sidecar["settings"]["size"]) == (6, "64x64")


@contextmanager
def served(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Site]]:
    """The command in a process of its own, with a folder for what is temporary."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    command = [Path(sys.executable).with_name("stdit"), "serve", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, env=environment, cwd=folder, **pipes)
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if line.startswith("the page is at "))
        [own] = folder.glob("stdit-serve-*")
        yield server, Site.at(int(line.split()[4].rpartition(":")[2]), own)
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_it_ends_with_ctrl_c(tmp_path: Path) -> None:
    with served(tmp_path) as (server, site):
        page = site.listen("heartbeat/abc")
        assert page.readline() == b"data: ALIVE\n"
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
    assert (server.returncode, out, err) == (0, "ended\n", "")
    assert list(tmp_path.glob("stdit-serve-*")) == []


@pytest.mark.slow
def test_it_ends_with_ctrl_c_while_requests_wait(tmp_path: Path) -> None:
    with served(tmp_path) as (server, site):
        form = site.form(steps=100, frames=16, height=128, width=128)
        sessions = [site.join("make", form)[1] for _ in range(3)]
        pages = [site.listen(f"queue/data?session_hash={session}") for session in sessions[1:]]
        site.wait(sessions[0], "progress")
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=120)
    assert len(pages) == 2  # open until here
    assert (server.returncode, out, err) == (0, "ended\n", "")
    assert list(tmp_path.glob("stdit-serve-*")) == []


@pytest.mark.slow
def test_the_examples_are_what_the_demo_makes(stdit: Callable, tmp_path: Path) -> None:
    assert stdit("sample", *EXAMPLES, "--format", "frames", "--out", tmp_path / "made").code == 0
    for prompt, file in zip(EXAMPLES, example_files(), strict=True):
        frames = ImageSequence.Iterator(Image.open(file))
        expected = np.stack([np.array(frame.convert("RGB"), np.float32) for frame in frames])
        made = sorted((tmp_path / "made" / f"{slug(prompt)}-0").glob("*.png"))
        difference = np.stack([np.array(Image.open(frame), np.float32) for frame in made]) - expected
        assert 10 * np.log10(255**2 / np.square(difference).mean()) > 30  # dB, for the compression
