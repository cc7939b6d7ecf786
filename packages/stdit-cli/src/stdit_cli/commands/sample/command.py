"""`stdit sample`: its options, and how they become a request."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from stdit_cli import completion
from stdit_cli.commands.sample.prompts import read_prompts
from stdit_cli.commands.sample.request import FORMATS, LONG, OFFLOADS, SEED_MAX, PromptRequest, SampleRequest, Settings
from stdit_train.assets import named_source
from stdit_train.errors import ConfigError

PROMPTS, MODEL, VIDEO, START = "Prompts", "Model", "Video", "Start from an image or a video"
SAMPLING, OUTPUT = "Sampling", "Output"
# Options of the model, which `stdit serve` has as well.
Vae = Annotated[
    str | None, typer.Option(help="VAE: a folder or Hub id.", show_default="the checkpoint's", rich_help_panel=MODEL)
]
TextEncoder = Annotated[
    str | None,
    typer.Option(help="T5 encoder: a folder or Hub id.", show_default="the checkpoint's", rich_help_panel=MODEL),
]
Text8bit = Annotated[
    bool | None,
    typer.Option("--text-8bit", help="Load the text encoder in 8 bits (needs bitsandbytes).", rich_help_panel=MODEL),
]
Offload = Annotated[
    str | None,
    typer.Option(
        help="Keep in main memory what is not computed with: model (all but a component), group (all but a block) "
        "or sequential (all but a layer, slow).",
        autocompletion=completion.choices(*OFFLOADS),
        rich_help_panel=MODEL,
    ),
]
OUTPUT_OPTIONS = {"out", "format", "overwrite"}  # options that do not change the video


def sample(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="What the videos should show.")] = None,
    prompts_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompts",
            help="File of prompts, .txt, .csv or .jsonl; may be repeated. See docs/sampling.md.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="Negative prompt, which guidance moves away from.", rich_help_panel=PROMPTS)
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=1, help="Videos per prompt.", show_default="1", rich_help_panel=PROMPTS)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=SEED_MAX,
            help="Seed of the first video per prompt; later ones add 1.",
            show_default="0",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Repeat the video whose JSON file this is; other options override its settings.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Pipeline folder, run folder, released .pth file or Hub id.",
            show_default="the bundled demo",
            rich_help_panel=MODEL,
        ),
    ] = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="FILE[:SCALE]",
            help="LoRA adapter: a file, a run folder or a Hub id, and the factor of its update (1). May be repeated.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    low_memory: Annotated[
        bool | None,
        typer.Option(
            "--low-memory",
            help="Encode the text, free the text encoder, sample, then decode frame by frame.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    text_8bit: Text8bit = None,
    offload: Offload = None,
    compile: Annotated[
        bool | None,
        typer.Option("--compile", help="Compile the transformer's blocks, for many videos.", rich_help_panel=MODEL),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frames per video.", show_default="the checkpoint's", rich_help_panel=VIDEO),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="HEIGHTxWIDTH in pixels, or one number for both.",
            show_default="the checkpoint's",
            rich_help_panel=VIDEO,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1000,
            help="Frames per second of the video.",
            show_default="the checkpoint's",
            rich_help_panel=VIDEO,
        ),
    ] = None,
    long: Annotated[
        str | None,
        typer.Option(
            help="Method for videos longer than the training clips: windows, stretch or whole.",
            show_default="windows",
            autocompletion=completion.choices(*LONG),
            rich_help_panel=VIDEO,
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            min=1, help="Frames shared by consecutive windows.", show_default="half a window", rich_help_panel=VIDEO
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Image to start from, as the first frame.", rich_help_panel=START)
    ] = None,
    video: Annotated[str | None, typer.Option(help="Video to continue.", rich_help_panel=START)] = None,
    extend: Annotated[
        int | None,
        typer.Option(
            min=1, help="Frames to add to --video.", show_default="the training length", rich_help_panel=START
        ),
    ] = None,
    resampling_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Resampling passes per denoising step, to fit new frames to the given ones.",
            show_default="the checkpoint's",
            rich_help_panel=START,
        ),
    ] = None,
    settling: Annotated[int | None, typer.Option(min=0, hidden=True)] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Denoising steps.", show_default="the checkpoint's", rich_help_panel=SAMPLING),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="euler, ddpm, ddim, dpmsolver++ or unipc.",
            show_default="the checkpoint's",
            autocompletion=completion.samplers,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Scale of classifier-free guidance.", show_default="the checkpoint's", rich_help_panel=SAMPLING
        ),
    ] = None,
    guidance_rescale: Annotated[
        float | None,
        typer.Option(
            help="Guidance rescale, 0 to 1, against over-exposure.", show_default="0", rich_help_panel=SAMPLING
        ),
    ] = None,
    guidance_interval: Annotated[
        str | None,
        typer.Option(help="Share of the steps to guide, e.g. 0.1,0.7.", show_default="0,1", rich_help_panel=SAMPLING),
    ] = None,
    compat: Annotated[
        str | None,
        typer.Option(help="Reference whose sampler and guidance to use: open-sora-1.0.", rich_help_panel=SAMPLING),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Reuse parts of earlier steps, faster and less exact: first-block[:0.05], pab[:2], fastercache[:5] or "
            "taylorseer[:3].",
            autocompletion=completion.caches,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Videos made at once.", show_default="1", rich_help_panel=SAMPLING)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the videos, or FILE.mp4 for a single one.", show_default="videos", rich_help_panel=OUTPUT
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="mp4, gif, webp, png (one frame) or frames (a folder of PNGs).",
            show_default="from --out; otherwise mp4, or png for one frame",
            autocompletion=completion.choices(*FORMATS),
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of the same name.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Make videos from prompts."""
    if settling is not None:
        typer.echo("stdit: --settling is deprecated: use --resampling-steps", err=True)
    settings = {
        "checkpoint": None if checkpoint is None else named_source(checkpoint),
        "vae": vae,
        "text_encoder": text_encoder,
        "lora": lora or None,
        "frames": frames,
        "size": size,
        "fps": fps,
        "steps": steps,
        "guidance": guidance,
        "guidance_rescale": guidance_rescale,
        "guidance_interval": guidance_interval,
        "sampler": sampler,
        "compat": compat,
        "long": long,
        "overlap": overlap,
        "image": image,
        "video": video,
        "extend": extend,
        "resampling_steps": settling if resampling_steps is None else resampling_steps,
        "low_memory": low_memory,
        "text_8bit": text_8bit,
        "offload": offload,
        "compile": compile,
        "cache": cache,
    }
    options = {
        "num": num,
        "seed": seed,
        "negative": negative,
        "batch": batch,
        "out": out,
        "format": format,
        "overwrite": overwrite,
    }
    request = make_request(prompts or [], prompts_files or [], from_, _given(settings), _given(options))

    from stdit_cli.commands.sample.run import run_sampling

    run_sampling(request)


def make_request(
    prompts: list[str],
    prompts_files: list[Path],
    recorded_file: Path | None,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> SampleRequest:
    """Gather prompts, settings and options into one request.

    Args:
        prompts: of the command line.
        prompts_files: files of more.
        recorded_file: a sidecar, whose prompt and settings hold where none are given.
        settings: fields of `Settings` that were given.
        options: other fields of `SampleRequest` that were given.

    Raises:
        ConfigError: no prompt or an empty one, a file that cannot be read, or options that contradict each other.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise ConfigError('the prompt is empty: describe the video, e.g. "a red circle moving left"')
    requests = [PromptRequest(prompt) for prompt in prompts]
    for file in prompts_files:
        requests += read_prompts(file)
    if options.get("negative", "x").strip() == "":
        options = {**options, "negative": None}
    if recorded_file is None:
        if not requests:
            raise ConfigError('no prompt: describe the video, e.g. stdit sample "a red circle moving left"')
        request = SampleRequest(requests, Settings(**settings), **options)
    else:
        from stdit_cli.commands.sample import sidecar

        recorded = sidecar.read(recorded_file)
        changed = bool(requests or settings or options.keys() - OUTPUT_OPTIONS)
        request = SampleRequest(
            requests or [PromptRequest(recorded["prompt"])],
            replace(Settings(**recorded["settings"]), **settings),
            **{"seed": recorded["seed"], "negative": recorded["negative"], **options},
            recorded=None if changed else recorded,
        )
    request.check()
    return request


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in options.items() if value is not None}
