"""What `stdit sample` was asked for, and each video of it as a job. Plain data: no heavy imports."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMATS = ("mp4", "gif", "webp", "png", "frames")
SEED_MAX = 2**63 - 1  # of torch's generators
LONG = ("windows", "stretch", "whole")


@dataclass(frozen=True)
class PromptRequest:
    """A prompt with what a line of a prompts file can say about it; None is left to the command's options."""

    prompt: str
    seed: int | None = None
    negative: str | None = None


@dataclass(frozen=True)
class Settings:
    """How a video is made: what its sidecar records, and `--from` takes up again. None is left to the checkpoint."""

    checkpoint: str = "demo"
    vae: str | None = None
    text_encoder: str | None = None
    frames: int | None = None
    size: str | None = None  # HEIGHTxWIDTH
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: str | None = None  # "0.1,0.7", shares of the steps
    sampler: str | None = None
    compat: str | None = None
    long: str = "windows"
    overlap: int | None = None
    image: str | None = None
    video: str | None = None
    extend: int | None = None
    settling: int | None = None
    low_memory: bool = False
    text_8bit: bool = False

    def check(self) -> None:
        """What can be told before anything is loaded.

        Raises:
            ValueError: an option whose value makes no sense, or two that contradict each other.
        """
        parse_size(self.size)
        parse_interval(self.guidance_interval)
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise ValueError(f"--guidance-rescale {self.guidance_rescale}: expected 0 to 1")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"--guidance {self.guidance}: expected a number")
        if self.long not in LONG:
            raise ValueError(f"--long {self.long}: choose {', '.join(LONG)}")
        if self.image is not None and self.video is not None:
            raise ValueError("--image and --video: give one of the two to go on from")
        if self.image is not None and self.frames == 1:
            raise ValueError("--image and --frames 1: the picture is the first frame, which leaves nothing to make")
        if self.extend is not None and self.video is None:
            raise ValueError("--extend says how many frames to add to --video: give that too")
        if self.video is not None and self.frames is not None:
            raise ValueError("--frames and --video: say how many frames to add with --extend")
        for option, file in (("--image", self.image), ("--video", self.video)):
            if file is not None and "://" not in file and not Path(file).expanduser().is_file():
                raise FileNotFoundError(f"{option} {file}: no such file")


@dataclass(frozen=True)
class Request:
    """One command.

    Attributes:
        wanted: the prompts.
        settings: shared by all videos.
        num: videos of each prompt.
        seed: of each prompt's first video; the next ones count up.
        negative: what guidance moves away from, where a prompt does not say.
        batch: videos made at once.
        out: folder, or file for a single video; videos/ unless given.
        format: see FORMATS; from `out`, else mp4, or png for a single frame.
        overwrite: replace files of the same name.
        recorded: the sidecar that this repeats.
    """

    wanted: list[PromptRequest]
    settings: Settings
    num: int = 1
    seed: int = 0
    negative: str | None = None
    batch: int = 1
    out: Path | None = None
    format: str | None = None
    overwrite: bool = False
    recorded: dict[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Job:
    """One video to make. Its noise comes from its seed alone, so it does not depend on what else is asked for."""

    prompt: str
    negative: str | None
    seed: int
    path: Path


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """HEIGHTxWIDTH in pixels, or one number for both."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if match is None or int(match[1]) == 0 or match[2] == "0":
        raise ValueError(f"--size {size}: expected HEIGHTxWIDTH in pixels, as in 64x64")
    return int(match[1]), int(match[2] or match[1])


def parse_interval(interval: str | None) -> tuple[float, float]:
    """Two shares of the steps, "0.1,0.7"."""
    if interval is None:
        return 0.0, 1.0
    match = re.fullmatch(r"\s*([\d.]+)\s*,\s*([\d.]+)\s*", interval)
    try:
        first, last = (float(share) for share in match.groups()) if match else (1.0, 0.0)
    except ValueError:
        first, last = 1.0, 0.0
    if not 0.0 <= first < last <= 1.0:
        raise ValueError(f"--guidance-interval {interval}: expected two shares of the steps, as in 0.1,0.7")
    return first, last
