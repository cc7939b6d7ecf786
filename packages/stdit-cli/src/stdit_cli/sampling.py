"""What `stdit sample` does with its options: load, warn, generate, write."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stdit_cli.assets import resolve

VIDEOS = Path("videos")
SHEET_ROWS = 24  # videos on a contact sheet at most


@dataclass(frozen=True)
class Request:
    """The options of `stdit sample`."""

    prompts: list[str]
    checkpoint: str
    out: Path | None
    num: int
    seed: int
    steps: int | None
    guidance: float | None
    negative: str | None
    sampler: str | None
    frames: int | None
    size: str | None
    fps: float | None
    overwrite: bool


def run_sampling(request: Request) -> None:
    """Make the videos one after another, so that those that are done survive an interruption."""
    started = time.perf_counter()
    console = Console(highlight=False)
    height, width = parse_size(request.size)
    targets = plan_files(request)

    import torch

    from stdit_data.sheet import contact_sheet
    from stdit_data.video import write_mp4
    from stdit_model.samplers import use_sampler
    from stdit_train.loading import load_pipeline

    if request.checkpoint == "demo":
        console.print("with the bundled demo model (shapes, 16 frames of 64x64); --checkpoint takes another")
    pipeline = load_pipeline(resolve(request.checkpoint))
    if request.sampler is not None:
        use_sampler(pipeline, request.sampler)
    warn(console, pipeline, request, height, width)
    config = pipeline.config
    fps = request.fps or config.fps

    jobs = [(prompt, i) for prompt in request.prompts for i in range(request.num)]
    videos = []
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(jobs) * (request.steps or config.num_inference_steps))

        def advance(_pipeline: Any, _index: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            bar.advance(task)
            return kwargs

        for k, ((prompt, _), path) in enumerate(zip(jobs, targets, strict=True)):
            output: Any = pipeline(
                prompt,
                request.negative,
                num_frames=request.frames,
                height=height,
                width=width,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                generator=torch.Generator().manual_seed(request.seed + k),
                callback_on_step_end=advance,
            )
            video = output.frames[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mp4(path, video, fps)
            videos.append(video)
            console.print(f"{path}")
    if len(videos) > 1:
        sheet = free_path(targets[0].parent / "contact-sheet.png", request.overwrite)
        contact_sheet(videos[:SHEET_ROWS], [prompt for prompt, _ in jobs][:SHEET_ROWS]).save(sheet)
        console.print(f"{sheet}")
    console.print(f"{len(videos)} video{'s' * (len(videos) > 1)} in {time.perf_counter() - started:.1f} s")


def plan_files(request: Request) -> list[Path]:
    """A file for each video, decided before any work is done.

    Raises:
        ValueError: one file name for several videos.
        FileExistsError: the named file is there already.
    """
    count = len(request.prompts) * request.num
    if request.out is not None and request.out.suffix == ".mp4":
        if count > 1:
            raise ValueError(f"--out {request.out} is one file, but {count} videos are asked for: give a folder")
        if request.out.exists() and not request.overwrite:
            raise FileExistsError(f"{request.out} exists: take another name, or --overwrite")
        return [request.out]
    if request.out is not None and request.out.suffix:
        raise ValueError(f"--out {request.out}: only .mp4 files are written; give FILE.mp4 or a folder")
    folder = request.out or VIDEOS
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder with --out")
    files: list[Path] = []
    for i in range(count):
        name = f"{slug(request.prompts[i // request.num])}-{request.seed + i}.mp4"
        files.append(free_path(folder / name, request.overwrite))
    return files


def free_path(path: Path, overwrite: bool) -> Path:
    """The path itself, or with -2, -3, ... before its suffix when something is there that must not be replaced."""
    candidate, number = path, 2
    while candidate.exists() and not overwrite:
        candidate, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return candidate


def slug(prompt: str) -> str:
    """A file name that says what the prompt says: "a-red-circle-moving-left"."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "video"


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """HEIGHTxWIDTH in pixels, or one number for both."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if match is None:
        raise ValueError(f"--size {size}: expected HEIGHTxWIDTH in pixels, as in 64x64")
    return int(match[1]), int(match[2] or match[1])


def warn(console: Console, pipeline: Any, request: Request, height: int | None, width: int | None) -> None:
    """A line where the request is outside what the checkpoint was trained for."""
    from stdit_model.text import dropped_text, unknown_words

    config = pipeline.config
    for prompt in dict.fromkeys(request.prompts):
        unknown = unknown_words(pipeline.tokenizer, prompt)
        if unknown:
            words = ", ".join(repr(word) for word in unknown)
            known = sorted(word for word in pipeline.tokenizer.get_vocab() if not word.startswith("<"))
            listing = f"; it knows {', '.join(known)}" if len(known) < 100 else ""
            console.print(f"warning: this checkpoint does not know {words}{listing}")
        dropped = dropped_text(pipeline.tokenizer, prompt, pipeline.transformer.config.model_max_length)
        if dropped:
            console.print(f"warning: the prompt is too long for this checkpoint; left out: {dropped!r}")
    asked = (request.frames or config.num_frames, height or config.height, width or config.width)
    trained = (config.num_frames, config.height, config.width)
    if asked != trained:
        console.print(
            f"warning: trained on {'x'.join(map(str, trained))} (frames x height x width), "
            f"asked for {'x'.join(map(str, asked))}"
        )
