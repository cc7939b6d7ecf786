"""Where the videos of a request go: paths planned before any work is done, and files in the chosen format."""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from stdit_cli.commands.sample.request import FORMATS, Job, SampleRequest
from stdit_train.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

VIDEOS = Path("videos")
_FILE_FORMATS = tuple(name for name in FORMATS if name != "frames")
_SUFFIXES = tuple(f".{name}" for name in _FILE_FORMATS)


def output_file(request: SampleRequest) -> Path | None:
    """The single file that --out names; None if it names a folder, or nothing.

    An existing folder is a folder, whatever its name; else a name with a suffix is a file.
    """
    out = request.out
    return out if out is not None and out.suffix and not out.is_dir() else None


def video_format(request: SampleRequest, frames: int) -> str:
    """Choose the format: as asked, by the name of --out, else mp4, or png for a single frame.

    Args:
        request: with `format` and `out`.
        frames: of each video.

    Raises:
        ConfigError: an unknown format, one that the name of --out contradicts, or png for several frames.
    """
    file = output_file(request)
    named = file.suffix[1:].lower() if file is not None else None
    chosen = request.format or named or ("png" if frames == 1 else "mp4")
    if named is not None and named not in _FILE_FORMATS:
        raise ConfigError(f"--out {file}: expected a {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]} file, or a folder")
    if chosen not in FORMATS:
        raise ConfigError(f"--format {chosen}: choose {', '.join(FORMATS)}")
    if named is not None and chosen != named:
        raise ConfigError(f"--out {file} is not a {chosen} file: leave out --format, or give a folder")
    if chosen == "png" and frames > 1:
        raise ConfigError(f"a png holds one frame, not {frames}: take --format frames for a folder of pictures")
    return chosen


def check_out(request: SampleRequest) -> None:
    """Check that the videos can go where --out says.

    Raises:
        ConfigError: one file name for several videos, a file that exists, or a file in a folder's place.
    """
    file, count = output_file(request), len(request.prompts) * request.num
    folder = request.out or VIDEOS
    if file is not None:
        if count > 1:
            raise ConfigError(f"--out {file} is one file for {count} videos: give a folder")
        if not request.overwrite:
            for path in (file, sidecar_path(file)):
                if path.exists():
                    raise ConfigError(f"{path} exists: choose another name, or pass --overwrite")
    elif folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: give a folder with --out")


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
    """Return the path of the JSON file beside a video, or beside a folder of frames."""
    return path.with_name(f"{path.name if path.suffix not in _SUFFIXES else path.stem}.json")


def slug(prompt: str) -> str:
    """Turn a prompt into a file name: "a-red-circle-moving-left"."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "video"


def write_video(path: Path, kind: str, video: "Tensor", fps: float) -> None:
    """Write a video in one of the formats.

    Args:
        path: of the file, or of the folder of frames.
        kind: one of `FORMATS`.
        video: [3, T, H, W] in [-1, 1].
        fps: frames a second when played.

    Raises:
        DataError: it cannot be written there.
    """
    from stdit_data.files import wrap_errors
    from stdit_data.video.write import write_frames, write_gif, write_mp4, write_png, write_webp

    with wrap_errors(str(path.parent)):
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
