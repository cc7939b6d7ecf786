"""Describe pictures with a model behind OpenAI's HTTP API, as vLLM and SGLang serve it.

Requests are plain JSON over the standard library's HTTP client; faults that pass are retried as those of stores are.
"""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image

from stdit_data.curation.captioners.prompts import Answer, Question
from stdit_data.errors import DataError, StoreError
from stdit_data.storage import readers, stores
from stdit_data.workers.work import Unavailable

TIMEOUT = 600.0  # seconds for an answer; a busy server queues requests
POLL = 0.1  # seconds until a request notices that it is not to be waited for any more
JPEG_QUALITY = 92
OF_ONE_CLIP = {400, 413, 422}  # what a server answers if it is the request that is wrong


class ServerCaptioner:
    """A served model.

    Args:
        url: of the server, with or without /v1 at its end.
        model: name under which it is served; see `find_model`.
        temperature: of sampling.
        max_tokens: of an answer.
        batch: requests at a time.

    The environment variable OPENAI_API_KEY holds the server's key if it wants one.
    """

    def __init__(self, url: str, model: str, *, temperature: float, max_tokens: int, batch: int) -> None:
        self.url, self.batch = base_url(url), batch
        self.fixed = {"model": model, "temperature": temperature, "max_tokens": max_tokens}

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer questions, `batch` at a time. A request that the server refuses gives a failure.

        Raises:
            Unavailable: the server is lost, or refuses everything.
        """
        with readers.threads(self.batch) as pool:
            return list(pool.map(self._answer, questions))

    def _answer(self, question: Question) -> Answer:
        images = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in question.images]
        content = [*images, {"type": "text", "text": question.prompt}]
        body = {**self.fixed, "seed": question.seed, "messages": [{"role": "user", "content": content}]}
        try:
            reply = _request(f"{self.url}/chat/completions", body)
            choice = reply["choices"][0]
            return Answer(choice["message"].get("content") or "", choice.get("finish_reason") != "length")
        except _Refused as error:
            if error.status in OF_ONE_CLIP:
                return Answer("", failure=f"refused by the server: {error}")
            raise Unavailable(f"{self.url}: {error}") from None
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Unavailable(f"{self.url}: its answer holds no choices; expected a chat completion") from None


def find_model(url: str, model: str | None) -> str:
    """Return the name of the model to ask for; check that the server serves it and takes several images.

    Args:
        url: of the server.
        model: name; the only one that the server has by default.

    Raises:
        DataError: no server there, no such model, or none for several images.
    """
    base = base_url(url)
    try:
        names = [entry["id"] for entry in _request(f"{base}/models")["data"]]
    except _Refused as error:
        raise DataError(f"{base}/models: {error}; expected a server with OpenAI's API") from None
    except (KeyError, TypeError):
        raise DataError(f"{base}/models: no list of models; expected a server with OpenAI's API") from None
    if model is None and len(names) != 1:
        raise DataError(f"{base} serves {', '.join(names) or 'no model'}; name one of them, `model=NAME`")
    name = model or names[0]
    if name not in names:
        raise DataError(f"{base} does not serve {name!r}; it serves {', '.join(names) or 'no model'}")
    pictures = [np.full((64, 64, 3), 80 * number, np.uint8) for number in range(3)]
    trial = ServerCaptioner(url, name, temperature=0.0, max_tokens=8, batch=1)([Question(pictures, "Describe.", 0)])
    if trial[0].failure:
        raise DataError(f"{base}: {name} takes no three images in a chat ({trial[0].failure})")
    return name


def base_url(url: str) -> str:
    """Return a server's URL up to and including /v1."""
    plain = url.rstrip("/")
    if not plain.startswith(("http://", "https://")):
        raise DataError(f"server {url!r}: expected a URL such as http://localhost:8000/v1")
    return plain if plain.endswith("/v1") else f"{plain}/v1"


def data_url(image: np.ndarray[Any, Any]) -> str:
    """Return a picture [H, W, 3] uint8 as a data URL of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class _Refused(Exception):
    """A lasting answer other than success."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}{': ' if text else ''}{' '.join(text.split())[:200]}")
        self.status = status


def _request(url: str, body: dict[str, Any] | None = None) -> Any:
    """Return the JSON that a server answers, waiting for faults that pass to end.

    Raises:
        _Refused: it answers with an error that lasts.
        Unavailable: it does not answer, or not with JSON.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)

    def send() -> bytes:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            answer: bytes = reply.read()
            return answer

    try:
        return json.loads(stores.retry(url, lambda: _abandonable(send)))
    except urllib.error.HTTPError as error:
        raise _Refused(error.code, _message(error)) from None
    except StoreError as error:
        raise Unavailable(f"{url}: the server is lost ({stores.explain(error.__cause__ or error)})") from None
    except OSError as error:
        raise Unavailable(f"{url}: no server to be reached ({stores.explain(error)})") from None
    except ValueError:
        raise Unavailable(f"{url}: the answer is no JSON; expected a server with OpenAI's API") from None


def _abandonable(send: Callable[[], bytes]) -> bytes:
    """Return what a request returns. It is sent by a thread that is left to itself once this one's reader is set.

    Raises:
        ConnectionAbortedError: the reader is set.
    """
    reply: Future[bytes] = Future()

    def run() -> None:
        try:
            reply.set_result(send())
        except BaseException as error:
            reply.set_exception(error)

    Thread(target=run, daemon=True).start()
    while not wait([reply], POLL).done:
        if readers.current().is_set():
            raise ConnectionAbortedError("interrupted")
    return reply.result()


def _message(error: urllib.error.HTTPError) -> str:
    """Return what the server says of an error: OpenAI's `error.message`, or the text as it is."""
    text = error.read().decode(errors="replace")
    try:
        found = json.loads(text)
        inner = found.get("error", found)
        return str(inner["message"] if isinstance(inner, dict) else inner)
    except (ValueError, KeyError, AttributeError):
        return text
