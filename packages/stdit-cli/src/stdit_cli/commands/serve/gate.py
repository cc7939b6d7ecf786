"""What of Gradio's server can be reached: the addresses that the page uses, and files of its own folder.

Gradio serves more than a page needs, for instance pages of other servers, recordings and an editor of its source.
"""

import json
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect

from stdit_cli.commands.serve.form import is_inside

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

ADDRESSES = {
    "GET": re.compile(
        r"/|/(config|theme\.css|manifest\.json|favicon\.ico|pwa_icon)|/(assets|static|svelte)/.+"
        r"|/gradio_api/(file=.+|queue/data|upload_progress|heartbeat/\w+|app_id|startup-events)"
    ),
    "POST": re.compile(r"/gradio_api/(upload|run/predict|queue/join|cancel|reset)"),
}
FILE = "/gradio_api/file="
JSON_BYTES = 1 << 20  # of a request that is not an upload
# The page loads nothing from elsewhere, and no other page frames it.
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'self'; "
    "base-uri 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class Gate:
    """An ASGI application in front of Gradio's, which refuses what the page does not need.

    Args:
        app: Gradio's.
        folder: the only one whose files may be read or named in a request.
    """

    def __init__(self, app: App, folder: Path) -> None:
        self.app, self.folder = app, folder

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        status = self._refusal(scope)
        if status is None and scope["method"] == "POST" and scope["path"] != "/gradio_api/upload":
            status, receive = await self._read(receive)
        if status is not None:
            await _answer(status, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        with suppress(ClientDisconnect):  # in the middle of an upload
            await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: Message) -> int | None:
        """Return the status to refuse a request with, by its address and headers; None to let it pass."""
        path, method = scope["path"], scope["method"]
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin")
        if method == "POST" and origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
            return 403  # another page, in the browser of someone who may reach this server
        addresses = ADDRESSES.get("GET" if method == "HEAD" else method)
        if addresses is None:
            return 405
        if not addresses.fullmatch(path):
            return 404
        if path.startswith(FILE):
            return None if is_inside(path.removeprefix(FILE), self.folder) else 403
        return 404 if ".." in path.split("/") or "\\" in path else None

    async def _read(self, receive: Receive) -> tuple[int | None, Receive]:
        """Read a request's JSON; returns the status to refuse it with, if any, and what gives it to Gradio."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return 400, receive
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > JSON_BYTES:
                return 413, receive
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            return 400, receive
        if not all(is_inside(path, self.folder) for path in _paths(content)):
            return 403, receive

        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return None, again


def _paths(content: Any) -> Iterator[str]:
    """Yield the paths of all files that JSON names as Gradio does, wherever: it would copy or fetch each of them."""
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if "path" in item:
                yield item["path"] if isinstance(item["path"], str) else ""
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


async def _answer(status: int, send: Send) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"refused\n"})
