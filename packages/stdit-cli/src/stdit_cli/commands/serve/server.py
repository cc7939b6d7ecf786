"""The server of the page: what it loads, its folder, and its end."""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from stdit_cli.commands.sample.request import Settings
from stdit_cli.commands.serve.address import is_loopback, listen, shown
from stdit_cli.commands.serve.limits import Limits
from stdit_cli.commands.serve.maker import Maker
from stdit_cli.console import ended_by_signal
from stdit_model.sampling.components import require
from stdit_train.assets import DEMO, resolve_source
from stdit_train.pipeline.find import find_checkpoint

if TYPE_CHECKING:
    from stdit_cli.commands.serve.gate import App

UPLOAD = "20mb"  # of a picture, at most
PATIENCE = 2  # seconds that open connections have at the end


def run_server(names: list[str], settings: Settings, limits: Limits, host: str, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        names: checkpoints that the page offers, by these names.
        settings: how to load them.
        limits: of a request.
        host, port: to listen on.

    Raises:
        ConfigError, WeightsError: an address that cannot be had, or a checkpoint that cannot be loaded.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with (
        listen(host, port) as listener,
        ended_by_signal(),
        TemporaryDirectory(prefix="stdit-serve-", ignore_cleanup_errors=True) as folder,
        suppress(KeyboardInterrupt),
    ):
        sources = {name: find_checkpoint(resolve_source(name)) for name in names}
        for source in sources.values():
            source.trained()  # refuses what is no checkpoint of ours
        parts = {"vae": settings.vae, "text_encoder": settings.text_encoder}
        require({part: place for part, place in parts.items() if place is not None})
        console.print(f"loading {names[0]}")
        maker = Maker(sources, settings, Path(folder))
        app, end = make_app(maker, limits, host)
        console.print(f"the page is at {shown(listener, host)} (Ctrl-C ends it)")
        if not is_loopback(host):
            console.print("warning: other machines can reach the page, and it has no password")
        try:
            make_server(app, end).run(sockets=[listener])
        finally:
            maker.wait()  # for the current step, before the folder is deleted
    console.print("ended")


def make_app(maker: Maker, limits: Limits, host: str) -> tuple["App", Callable[[], None]]:
    """Load the first checkpoint and build the page.

    Args:
        maker: makes the videos, in a folder that is empty and takes uploads as well.
        limits: of a request.
        host: that the server listens on. Requests of browsers for another name are refused on the loopback: by DNS
            rebinding, a page from elsewhere could send them.

    Returns:
        The ASGI application, and a function that ends what it does.
    """
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(maker.folder),
        "GRADIO_EXAMPLES_CACHE": str(maker.folder / "examples"),
    }
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from stdit_cli.commands.serve.actions import Actions
    from stdit_cli.commands.serve.gate import Gate
    from stdit_cli.commands.serve.page import HEAD, build_page, style, theme

    actions = Actions(maker, limits)
    if DEMO in actions.names:
        maker.own(DEMO)  # which the examples fill in
    page = build_page(actions, maker.own(actions.names[0]))
    page.has_launched = True  # else Gradio does not check which files a request names
    inner = FastAPI(openapi_url=None)
    gradio.mount_gradio_app(
        inner,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=[],
        show_error=False,
        max_file_size=UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=style(),
        head=HEAD,
    )
    hosts = ["localhost", "127.0.0.1", "::1", host] if is_loopback(host) else ["*"]
    app: Any = TrustedHostMiddleware(Gate(inner, maker.folder), allowed_hosts=hosts, www_redirect=False)

    def end() -> None:
        maker.end()
        page.is_running = False
        page.app.stop_event.set()  # of the connections that pages hold

    return app, end


def make_server(app: "App", end: Callable[[], None]) -> Any:
    """Return uvicorn's server of an application, which ends it first when it is asked to end itself."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # connections are cut that last longer
            end()
            super().handle_exit(sig, frame)

    options: dict[str, Any] = {"log_level": "error", "ws": "none", "server_header": False, "lifespan": "on"}
    return Server(uvicorn.Config(cast(Any, app), timeout_graceful_shutdown=PATIENCE, **options))
