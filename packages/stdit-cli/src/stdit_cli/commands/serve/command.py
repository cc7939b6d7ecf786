"""`stdit serve`: its options."""

import importlib.util
from typing import Annotated

import typer

from stdit_cli.commands.sample.command import Offload, Text8bit, TextEncoder, Vae
from stdit_cli.commands.sample.request import Settings
from stdit_cli.commands.serve.limits import Limits
from stdit_train.assets import named_source
from stdit_train.errors import ConfigError

ADDRESS, LIMITS = "Address", "Limits of a request"
PORT = 7860  # Gradio's


def serve(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CKPT",
            help="Checkpoints that the page offers: pipeline folders, run folders, released .pth files or Hub ids.",
            show_default="the bundled demo",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 lets other machines in, without a password.", rich_help_panel=ADDRESS
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.", rich_help_panel=ADDRESS)
    ] = PORT,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    text_8bit: Text8bit = None,
    offload: Offload = None,
    max_frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most frames of a video.",
            show_default=f"{Limits.frames}, or the checkpoint's if that is more",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_size: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Most pixels of a side.",
            show_default=f"{Limits.size}, or the checkpoint's if that is more",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Most denoising steps.",
            show_default=f"{Limits.steps}, or the checkpoint's if that is more",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_prompt: Annotated[
        int, typer.Option(min=1, help="Most characters of a prompt.", rich_help_panel=LIMITS)
    ] = Limits.prompt,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Most requests that wait for their turn.", rich_help_panel=LIMITS)
    ] = Limits.waiting,
) -> None:
    """Make videos on a page in the browser, one at a time."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("stdit serve needs Gradio: run `uv sync --extra web`, or pip install 'stdit-cli[web]'")
    names = list(dict.fromkeys(map(named_source, checkpoints or ["demo"])))
    settings = Settings(vae=vae, text_encoder=text_encoder, text_8bit=bool(text_8bit), offload=offload)
    settings.check()
    limits = Limits(max_frames, max_size, max_steps, max_prompt, max_waiting)

    from stdit_cli.commands.serve.server import run_server

    run_server(names, settings, limits, host, port)
