"""A captioner behind OpenAI's API: a small server on the loopback."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stdit_data.curation.caption import CaptionStep, checked, flagged
from stdit_data.curation.captioners.prompts import Question
from stdit_data.curation.captioners.server import ServerCaptioner, base_url
from stdit_data.curation.engine import run
from stdit_data.curation.tables import open_rows
from stdit_data.errors import DataError
from stdit_data.storage import stores
from stdit_data.workers.executors import Inline
from stdit_data.workers.work import Unavailable


class Server:
    """OpenAI's API, as much of it as is used. It answers by the mean red of the first image."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.statuses: list[int] = []  # of the next answers, instead of success
        self.text = "The video shows a thing."
        self.idle = Event()  # cleared, answers are waited for
        self.idle.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, {"data": [{"id": "tiny-captioner"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({**body, "key": self.headers["Authorization"]})
                outer.idle.wait(10)
                if outer.statuses and (status := outer.statuses.pop(0)) != 200:
                    self.answer(status, {"error": {"message": "At most 1 image(s)\nmay be provided"}})
                    return
                reason = "length" if outer.text.endswith("and") else "stop"
                self.answer(200, {"choices": [{"message": {"content": outer.text}, "finish_reason": reason}]})

            def answer(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(stores, "_patience", 0.01)
    found = Server()
    yield found
    found.close()


def test_a_server_describes_clips(raw: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    step = checked(CaptionStep(server=server.url, batch=2, size=80))
    assert step.model == "tiny-captioner"
    server.requests.clear()
    server.statuses = [503, 200, 429]
    (tmp_path / "in.csv").write_text(
        f"path,caption,start,end\n{raw}/scenes.mp4,,3,9\n{raw}/good.mp4,a caption,,\n"
        f"{raw}/photo.png,,,\n{raw}/broken.mp4,,,\n"
    )
    out = tmp_path / "out.parquet"
    outcome = run(step, open_rows(str(tmp_path / "in.csv")), str(out), Inline())
    rows = pq.read_table(out).to_pylist()
    assert [row["caption"] for row in rows] == ["A thing.", "a caption", "A thing."]
    assert [row["caption_flag"] for row in rows] == [None] * 3
    assert outcome.rejects == 1
    asked = {len(request["messages"][0]["content"]): request for request in server.requests}
    assert sorted(asked) == [2, 4]  # one image and the prompt; three images and the prompt
    assert len(server.requests) == 4
    video = asked[4]
    assert video["key"] == "Bearer secret"
    assert (video["model"], video["temperature"], video["max_tokens"]) == ("tiny-captioner", 0.2, 320)
    assert "3 images are frames of one video, in chronological order" in video["messages"][0]["content"][-1]["text"]
    pictures = [np.asarray(picture_of(part)) for part in video["messages"][0]["content"][:3]]
    assert [picture.shape for picture in pictures] == [(48, 80, 3)] * 3
    assert np.abs(pictures[0].astype(int) - pictures[2]).mean() > 5


def picture_of(part: dict[str, Any]) -> Image.Image:
    kind, data = part["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_lost_server_ends_in_one_line_and_resumes(raw: Path, tmp_path: Path, server: Server) -> None:
    (tmp_path / "in.csv").write_text(f"path\n{raw}/good.mp4\n{raw}/still.mp4\n{raw}/blurred.mp4\n")
    step = checked(CaptionStep(server=f"{server.url}/v1/", shard_rows=1, batch=1))
    rows, out = open_rows(str(tmp_path / "in.csv")), str(tmp_path / "out.parquet")
    server.statuses = [200, *[500] * 1000]
    with pytest.raises(Unavailable, match=r"the server is lost \(HTTP 500\); finished shards are kept"):
        run(step, rows, out, Inline())
    server.statuses = []
    server.text = "Sorry, I cannot see the video."
    assert run(step, rows, out, Inline()).resumed == 1
    found = pq.read_table(out).to_pylist()
    assert [row["caption_flag"] for row in found] == [None, "refused", "refused"]
    assert [row["path"] for row in flagged(out)] == [str(raw / "still.mp4"), str(raw / "blurred.mp4")]
    # Flagged captions are written again, good ones are kept.
    server.text = "In this video, a texture moves and"
    again = str(tmp_path / "again.parquet")
    run(step, open_rows(out), again, Inline())
    assert [row["caption"] for row in pq.read_table(again).to_pylist()] == ["A thing.", *["A texture moves and"] * 2]
    assert [row["caption_flag"] for row in pq.read_table(again).to_pylist()] == [None, "cut off", "cut off"]
    overwriting = CaptionStep(model=step.model, server=step.server, overwrite=True)
    run(overwriting, open_rows(out), again, Inline())
    assert {row["caption"] for row in pq.read_table(again).to_pylist()} == {"A texture moves and"}


def test_what_a_server_refuses(raw: Path, tmp_path: Path, server: Server) -> None:
    with pytest.raises(DataError, match="does not serve 'other'; it serves tiny-captioner"):
        checked(CaptionStep(server=server.url, model="other"))
    server.statuses = [400]
    with pytest.raises(DataError, match=r"takes no three images .*At most 1 image"):
        checked(CaptionStep(server=server.url))
    step = checked(CaptionStep(server=server.url, batch=1))
    (tmp_path / "in.csv").write_text(f"path\n{raw}/good.mp4\n{raw}/still.mp4\n")
    rows, out = open_rows(str(tmp_path / "in.csv")), str(tmp_path / "out.parquet")
    server.statuses = [401]
    with pytest.raises(Unavailable, match="HTTP 401"):
        run(step, rows, out, Inline())
    server.statuses = [413]
    outcome = run(step, rows, out, Inline())
    assert (outcome.rows, outcome.rejects) == (1, 1)
    assert "refused by the server: HTTP 413" in (tmp_path / "out.rejects.jsonl").read_text()
    server.close()
    with pytest.raises(DataError, match="the server is lost"):
        checked(CaptionStep(server=server.url))
    with pytest.raises(DataError, match="expected a URL"):
        base_url("localhost:8000")


def test_ctrl_c_does_not_wait_for_answers(server: Server) -> None:
    captioner = ServerCaptioner(server.url, "tiny-captioner", temperature=0.0, max_tokens=8, batch=2)
    server.idle.clear()

    def press() -> None:
        while not server.requests:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    Timer(0, press).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        captioner([Question([np.zeros((8, 8, 3), np.uint8)], "Describe.", number) for number in range(4)])
    assert time.monotonic() - started < 3
    server.idle.set()
