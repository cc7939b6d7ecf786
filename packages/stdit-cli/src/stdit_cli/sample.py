"""`stdit sample`: parse, call, show."""

from pathlib import Path
from typing import Annotated

import typer


def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What the videos should show.")],
    checkpoint: Annotated[
        str, typer.Option(help="Pipeline folder, run folder or hub id; `demo` is the bundled one.")
    ] = "demo",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the videos, or FILE.mp4 for a single one; videos/ unless given.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Videos of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the first video; the next ones count up.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; the checkpoint's unless given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the checkpoint's unless given.")] = None,
    negative: Annotated[str | None, typer.Option(help="What guidance moves away from.")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, ddpm, ddim, dpmsolver++ or unipc.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames; the checkpoint's unless given.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels, or one number for both.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second when played.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name.")] = False,
) -> None:
    """Make videos from prompts. Without --checkpoint the bundled demo model makes them."""
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError('the prompt is empty: say what the video should show, as in "a red circle moving left"')
    from stdit_cli.sampling import Request, run_sampling

    run_sampling(
        Request(prompts, checkpoint, out, num, seed, steps, guidance, negative, sampler, frames, size, fps, overwrite)
    )
