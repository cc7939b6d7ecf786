"""Plan where the videos of a request are written, before any work is done, and write them in the chosen format."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from stdit_cli.commands.sample.request import FORMATS, Job, SampleRequest
from stdit_train.errors import ConfigError

VIDEOS = Path("videos")
_FILE_FORMATS = tuple(name for name in FORMATS if name != "frames")
_SUFFIXES = tuple(f".{name}" for name in _FILE_FORMATS)


def output_file(request: SampleRequest) -> Path | None:
    """Return the single file that --out names; None if it names a folder, or nothing.

    An existing folder is a folder, whatever its name; else a name with a suffix is a file.
    """
    out = request.out
    return out if out is not None and out.suffix and not out.is_dir() else None


def video_format(request: SampleRequest, frames: int | None = None) -> str | None:
    """Choose the format: --format, else the suffix of --out, else png for a single frame and mp4 for others.

    Args:
        request: with `format` and `out`.
        frames: of each video; None if not known yet.

    Returns:
        One of `FORMATS`; None if it depends on the number of frames.

    Raises:
        ConfigError: an unknown format, one that the name of --out contradicts, or png for several frames.
    """
    file = output_file(request)
    named = file.suffix[1:].lower() if file is not None else None
    chosen = request.format or named or (None if frames is None else "png" if frames == 1 else "mp4")
    if named is not None and named not in _FILE_FORMATS:
        raise ConfigError(f"--out {file}: expected a {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]} file, or a folder")
    if chosen is not None and chosen not in FORMATS:
        raise ConfigError(f"--format {chosen}: choose {', '.join(FORMATS)}")
    if named is not None and chosen != named:
        raise ConfigError(f"--out {file} is not a {chosen} file: leave out --format, or give a folder")
    if chosen == "png" and frames is not None and frames > 1:
        raise ConfigError(f"a png holds one frame, not {frames}: take --format frames for a folder of pictures")
    return chosen


def check_out(request: SampleRequest) -> None:
    """Check that the videos can go where --out says.

    Raises:
        ConfigError: one file name for several videos, a file that exists, a file in a folder's place, a folder that
            cannot be written to, or a format that is unknown or does not fit.
    """
    video_format(request, 2 if request.settings.video is not None else request.settings.frames)
    file, count = output_file(request), len(request.prompts) * request.num
    folder = request.out or VIDEOS
    if file is not None:
        if count > 1:
            raise ConfigError(f"--out {file} is one file for {count} videos: give a folder")
        for path in (file, sidecar_path(file)):
            if path.is_dir():
                raise ConfigError(f"{path} is a folder: choose another name")
            if path.exists() and not request.overwrite:
                raise ConfigError(f"{path} exists: choose another name, or pass --overwrite")
    folder = folder if file is None else file.parent
    there = next((place for place in (folder, *folder.parents) if place.exists()), Path())
    if not there.is_dir():
        raise ConfigError(f"{there} is a file: give a folder with --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{there} cannot be written to: give another folder with --out")


def plan_jobs(request: SampleRequest, kind: str) -> list[Job]:
    """Plan a job for each video in order: prompt by prompt, seeds counting up.

    Names do not depend on what is on the disk, so that several processes plan the same; see `unique_path`.

    Args:
        request: for its prompts, seeds and output.
        kind: the format, see `video_format`.
    """
    jobs, names = [], Counter[str]()
    file, folder = output_file(request), request.out or VIDEOS
    suffix = "" if kind == "frames" else f".{kind}"
    for asked in request.prompts:
        first = request.seed if asked.seed is None else asked.seed
        for seed in range(first, first + request.num):
            name = f"{slug(asked.prompt)}-{seed}"
            names[name] += 1
            name += f"-{names[name]}" if names[name] > 1 else ""
            negative = request.negative if asked.negative is None else asked.negative
            jobs.append(Job(asked.prompt, negative, seed, file or folder / f"{name}{suffix}"))
    return jobs


def unique_path(path: Path, overwrite: bool) -> Path:
    """Return the path itself, or one with -2, -3, ... if it or its sidecar exists and must not be replaced."""
    candidate, number = path, 2
    while not overwrite and (candidate.exists() or sidecar_path(candidate).exists()):
        candidate, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return candidate


def sidecar_path(path: Path) -> Path:
    """Return the path of the JSON file beside a video, or beside a folder of frames: v.mp4.json for v.mp4."""
    return path.with_name(f"{path.name}.json")


def old_sidecar_path(path: Path) -> Path:
    """Return where versions before 0.2.0 put the JSON file of a video: v.json for v.mp4 and for v.gif."""
    return path.with_name(f"{path.name if path.suffix not in _SUFFIXES else path.stem}.json")


def slug(prompt: str) -> str:
    """Turn a prompt into a file name: "a-red-circle-moving-left"."""
    name = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60]
    return name.encode()[:180].decode(errors="ignore").rstrip("-") or "video"  # names of files have 255 bytes at most


def format_remarks(kind: str, height: int, width: int, fps: float) -> Iterator[str]:
    """Yield a line where a format cannot hold a video as it is."""
    if kind == "mp4" and (height % 2 or width % 2):
        padded = f"{height + height % 2}x{width + width % 2}"
        yield (
            f"mp4 needs even sizes: {height}x{width} is written as {padded}, with the last row or column repeated; "
            f"--format webp or frames keeps {height}x{width}"
        )
    if kind == "gif" and fps > 50:
        yield f"gif plays at most 50 frames per second; --format mp4 or webp plays {fps:g}"
