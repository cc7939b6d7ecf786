"""`stdit sample`: parse, call, show."""

from pathlib import Path
from typing import Annotated

import typer


def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT...]", help="What the videos should show.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Pipeline folder, run folder, released .pth or hub id; the bundled `demo` unless given."),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="More prompts: a .txt, .csv or .jsonl; see docs/sampling.md.")
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Make a video again from the JSON beside it; options given here win.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the videos, or FILE.mp4 for a single one; videos/ unless given.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="mp4, gif, webp, png (one frame) or frames (a folder).")] = None,
    num: Annotated[int | None, typer.Option(min=1, help="Videos of each prompt.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of each prompt's first video; the next ones count up.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Videos made at once.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames; the checkpoint's unless given.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels, or one number for both.")] = None,
    fps: Annotated[float | None, typer.Option(min=0.1, max=1000, help="Frames a second when played.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; the checkpoint's unless given.")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, ddpm, ddim, dpmsolver++ or unipc.")] = None,
    compat: Annotated[str | None, typer.Option(help="open-sora-1.0: sampler and guidance as the reference.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the checkpoint's unless given.")] = None,
    guidance_rescale: Annotated[float | None, typer.Option(help="0 to 1, against over-exposure.")] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(help="Share of the steps that are guided, as in 0.1,0.7.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What guidance moves away from.")] = None,
    long: Annotated[
        str | None, typer.Option(help="For more frames than trained: windows (the default), stretch or whole.")
    ] = None,
    overlap: Annotated[int | None, typer.Option(min=1, help="Frames that a window goes on from; half of one.")] = None,
    image: Annotated[str | None, typer.Option(help="A picture that the video begins with.")] = None,
    video: Annotated[str | None, typer.Option(help="A video to go on from.")] = None,
    extend: Annotated[int | None, typer.Option(min=1, help="Frames to add to --video.")] = None,
    settling: Annotated[
        int | None, typer.Option(min=0, help="Extra passes a step that fit new frames to given ones.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Folder or hub id, in place of the checkpoint's.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="Folder or hub id, in place of the checkpoint's.")] = None,
    low_memory: Annotated[
        bool | None,
        typer.Option("--low-memory", help="Encode the text, free its encoder, sample, decode frame by frame."),
    ] = None,
    text_8bit: Annotated[
        bool | None, typer.Option("--text-8bit", help="Text encoder in 8 bits (needs bitsandbytes).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of the same name.")] = False,
) -> None:
    """Make videos from prompts. Without --checkpoint the bundled demo model makes them."""
    options = {name: value for name, value in locals().items() if value is not None}
    from stdit_cli.asking import make_request
    from stdit_cli.commands.sample.run import run_sampling

    run_sampling(make_request(options))
