"""Where the videos go: names decided before any work is done, in the format asked for."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from stdit_cli.commands.sample.request import FORMATS, Job, Request

VIDEOS = Path("videos")


def video_format(request: Request, frames: int) -> str:
    """The format to write: as asked, by the name of --out, else mp4, or png for a single frame.

    Raises:
        ValueError: none that is known, one that the name of --out contradicts, or a picture of several frames.
    """
    named = request.out.suffix[1:].lower() if request.out is not None and request.out.suffix else None
    chosen = request.format or named or ("png" if frames == 1 else "mp4")
    if named is not None and (named not in FORMATS or named == "frames"):
        written = ", ".join(f".{name}" for name in FORMATS if name != "frames")
        raise ValueError(f"--out {request.out}: {written} are written; give such a file or a folder")
    if chosen not in FORMATS:
        raise ValueError(f"--format {chosen}: choose {', '.join(FORMATS)}")
    if named is not None and chosen != named:
        raise ValueError(f"--out {request.out} is no {chosen}: leave --format away, or name a folder")
    if chosen == "png" and frames > 1:
        raise ValueError(
            f"a png holds one frame, and {frames} are asked for: take --format frames for a folder of them"
        )
    return chosen


def check_out(request: Request) -> None:
    """That the videos can go where --out says.

    Raises:
        ValueError: one file name for several videos.
        FileExistsError: the named file is there already, or a file is in the folder's place.
    """
    out, count = request.out, len(request.wanted) * request.num
    if out is not None and out.suffix:
        if count > 1:
            raise ValueError(f"--out {out} is one file, but {count} videos are asked for: give a folder")
        if (out.exists() or sidecar_path(out).exists()) and not request.overwrite:
            there = out if out.exists() else sidecar_path(out)
            raise FileExistsError(f"{there} exists: take another name, or --overwrite")
    elif (out or VIDEOS).exists() and not (out or VIDEOS).is_dir():
        raise FileExistsError(f"{out or VIDEOS} is a file: give a folder with --out")


def plan_jobs(request: Request, kind: str) -> list[Job]:
    """A job for each video, in order: of each prompt in turn, its seeds counting up.

    Names don't depend on what is on the disk, so that several processes plan the same: see `unique_path`.
    """
    jobs, names = [], Counter[str]()
    suffix = "" if kind == "frames" else f".{kind}"
    for wanted in request.wanted:
        first = request.seed if wanted.seed is None else wanted.seed
        for seed in range(first, first + request.num):
            name = f"{slug(wanted.prompt)}-{seed}"
            names[name] += 1
            name += f"-{names[name]}" if names[name] > 1 else ""
            path = request.out if request.out is not None and request.out.suffix else None
            path = path or (request.out or VIDEOS) / f"{name}{suffix}"
            negative = request.negative if wanted.negative is None else wanted.negative
            jobs.append(Job(wanted.prompt, negative, seed, path))
    return jobs


def unique_path(path: Path, overwrite: bool) -> Path:
    """The path itself, or with -2, -3, ... when it or its sidecar is there and must not be replaced."""
    candidate, number = path, 2
    while not overwrite and (candidate.exists() or sidecar_path(candidate).exists()):
        candidate, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return candidate


def sidecar_path(path: Path) -> Path:
    """The JSON file beside a video, or beside a folder of frames."""
    return path.with_name(f"{path.name if path.suffix not in _SUFFIXES else path.stem}.json")


_SUFFIXES = tuple(f".{name}" for name in FORMATS if name != "frames")


def slug(prompt: str) -> str:
    """A file name that says what the prompt says: "a-red-circle-moving-left"."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "video"


def write_video(path: Path, kind: str, video: Any, fps: float) -> None:
    """[3, T, H, W] in [-1, 1] in one of the formats."""
    from stdit_data.video.write import write_frames, write_gif, write_mp4, write_png, write_webp

    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "mp4":
        write_mp4(path, video, fps)
    elif kind == "gif":
        write_gif(path, video, fps)
    elif kind == "webp":
        write_webp(path, video, fps)
    elif kind == "png":
        write_png(path, video)
    else:
        write_frames(path, video)
