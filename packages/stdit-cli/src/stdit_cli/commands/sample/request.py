"""A request to `stdit sample` as plain data: its prompts, its settings, and a job for each video. No heavy imports."""

import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stdit_train.errors import ConfigError

FORMATS = ("mp4", "gif", "webp", "png", "frames")
SEED_MAX = 2**63 - 1  # of torch's generators
LONG = ("windows", "stretch", "whole")
OFFLOADS = ("model", "group", "sequential")
SIDE_MAX = 8192  # pixels
FRAMES_MAX = 100_000
VIDEOS_MAX = 100_000  # per prompt
# Bounds of settings that are numbers; a sidecar may have been edited.
BOUNDS: dict[str, tuple[float, float]] = {
    "frames": (1, FRAMES_MAX),
    "extend": (1, FRAMES_MAX),
    "overlap": (1, FRAMES_MAX),
    "fps": (0.1, 1000),
    "steps": (1, 1000),  # a model was trained on so many timesteps
    "resampling_steps": (0, 1000),
    "guidance_rescale": (0, 1),
}


@dataclass(frozen=True)
class PromptRequest:
    """A prompt, with the seed and negative prompt that a prompts file may give it; None leaves them to the command."""

    prompt: str
    seed: int | None = None
    negative: str | None = None


@dataclass(frozen=True)
class Settings:
    """How a video is made. A sidecar records these and `--from` reads them back; None means the checkpoint's own.

    Attributes:
        checkpoint, vae, text_encoder: folders, files or Hub ids.
        lora: adapters, each FILE or FILE:SCALE.
        frames: length of the video.
        size: HEIGHTxWIDTH in pixels.
        fps: frames a second when played.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        guidance_rescale: 0 to 1, against over-exposure.
        guidance_interval: the share of the steps that are guided, as "0.1,0.7".
        sampler: one of `stdit_model.sampling.schedulers`.
        compat: a reference implementation whose sampler and guidance to use.
        long: how to make more frames than the checkpoint was trained on, see `LONG`.
        overlap: frames shared by consecutive windows.
        image, video: what the video starts with.
        extend: frames to add to `video`.
        resampling_steps: extra passes per step, to fit new frames to the given ones.
        low_memory: load the text encoder, then drop it, and decode frame by frame.
        text_8bit: keep the text encoder's weights in 8 bits.
        offload: what of the weights to keep in main memory, one of `OFFLOADS`; None for nothing.
        compile: compile the transformer's blocks.
        cache: reuse parts of earlier steps, see `stdit_model.sampling.caches`.
    """

    checkpoint: str = "demo"
    vae: str | None = None
    text_encoder: str | None = None
    lora: list | None = None
    frames: int | None = None
    size: str | None = None
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: str | None = None
    sampler: str | None = None
    compat: str | None = None
    long: str = "windows"
    overlap: int | None = None
    image: str | None = None
    video: str | None = None
    extend: int | None = None
    resampling_steps: int | None = None
    low_memory: bool = False
    text_8bit: bool = False
    offload: str | None = None
    compile: bool = False
    cache: str | None = None

    def check(self) -> None:
        """Check what can be checked before anything is loaded.

        Raises:
            ConfigError: an option whose value makes no sense, two that contradict each other, or a missing file.
        """
        from stdit_model.sampling.caches import parse_cache
        from stdit_model.sampling.schedulers import check_sampler, compat

        parse_size(self.size)
        parse_interval(self.guidance_interval)
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # not a number is neither
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
        if self.sampler is not None:
            check_sampler(self.sampler)
        if self.compat is not None:
            compat(self.compat)
        if self.cache is not None:
            parse_cache(self.cache)
        if self.offload is not None and self.offload not in OFFLOADS:
            raise ConfigError(f"--offload {self.offload}: choose {', '.join(OFFLOADS)}")
        if self.offload is not None and (self.low_memory or self.text_8bit):
            other = "--low-memory" if self.low_memory else "--text-8bit"
            raise ConfigError(f"--offload and {other}: choose one of the two")
        if self.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise ConfigError("--compile needs a C++ compiler: install g++, or name another one in CXX")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ConfigError(f"--guidance {self.guidance}: expected a finite number")
        if self.long not in LONG:
            raise ConfigError(f"--long {self.long}: choose {', '.join(LONG)}")
        if self.image is not None and self.video is not None:
            raise ConfigError("--image and --video: give one of the two to start from")
        if self.image is not None and self.frames == 1:
            raise ConfigError("--image and --frames 1: the picture is the first frame, which leaves nothing to make")
        if self.extend is not None and self.video is None:
            raise ConfigError("--extend is the number of frames to add to --video: give that too")
        if self.video is not None and self.frames is not None:
            raise ConfigError("--frames and --video: set the number of frames to add with --extend")
        for adapter in self.lora or ():
            if not isinstance(adapter, str):  # in a sidecar that was edited
                raise ConfigError(f"--lora {adapter!r}: expected FILE or FILE:SCALE")
            parse_adapter(adapter)
        for option, file, picture in (("--image", self.image, True), ("--video", self.video, False)):
            if file is not None:
                _check_source(option, file, picture)


def _check_source(option: str, file: str, picture: bool) -> None:
    """Check that the picture or video to start from exists, by the suffix of its name a picture or not."""
    from stdit_data.storage.urls import is_image

    if "://" not in file and not Path(file).expanduser().is_file():
        raise ConfigError(f"{option} {file}: no such file")
    if is_image(file) != picture:
        expected = "a picture (.png, .jpg or .webp)" if picture else "a video; a picture is given with --image"
        raise ConfigError(f"{option} {file}: expected {expected}")


@dataclass(frozen=True)
class SampleRequest:
    """One run of `stdit sample`.

    Attributes:
        prompts: what the videos should show.
        settings: shared by all videos.
        num: videos per prompt.
        seed: of the first video per prompt; later ones add 1.
        negative: negative prompt, where a prompt has none of its own.
        batch: videos made at once.
        out: folder, or file for a single video; None for videos/.
        format: one of `FORMATS`; None to follow `out`, else mp4, or png for a single frame.
        overwrite: replace files of the same name.
        recorded: the sidecar that this repeats unchanged.
    """

    prompts: list[PromptRequest]
    settings: Settings
    num: int = 1
    seed: int = 0
    negative: str | None = None
    batch: int = 1
    out: Path | None = None
    format: str | None = None
    overwrite: bool = False
    recorded: dict[str, Any] | None = field(default=None, repr=False)

    def check(self) -> None:
        """Check what can be checked before anything is loaded, except for where the videos go.

        Raises:
            ConfigError: see `Settings.check`; or a text that is not UTF-8, a number of videos or a seed out of range.
            SettingsError: a text without words.
        """
        self.settings.check()
        for text in (self.negative, *(text for asked in self.prompts for text in (asked.prompt, asked.negative))):
            if text is not None and any(0xD800 <= ord(letter) < 0xE000 for letter in text):
                raise ConfigError(f"the prompt {text!a} is not UTF-8 text")
        self._check_words()
        if self.num > VIDEOS_MAX:
            raise ConfigError(f"--num {self.num}: expected 1 to {VIDEOS_MAX}")
        last = max(self.seed if asked.seed is None else asked.seed for asked in self.prompts) + self.num - 1
        if last > SEED_MAX:
            raise ConfigError(f"--seed and --num: the last video's seed, {last}, is above {SEED_MAX}")

    def _check_words(self) -> None:
        """Check that the text encoder gets words."""
        from stdit_model.sampling.inputs import check_prompts

        check_prompts([asked.prompt for asked in self.prompts])
        negatives = [text for text in (self.negative, *(asked.negative for asked in self.prompts)) if text]
        if negatives:
            check_prompts(negatives, "negative prompt")


@dataclass(frozen=True)
class Job:
    """One video to make. Its noise depends on its seed alone, not on what else is made with it."""

    prompt: str
    negative: str | None
    seed: int
    path: Path


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Parse HEIGHTxWIDTH in pixels, or one number for both.

    Raises:
        ConfigError: anything else.
    """
    if size is None:
        return None, None
    match = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", size)
    if match is None:
        raise ConfigError(f"--size {size}: expected HEIGHTxWIDTH in pixels, e.g. 64x64")
    height, width = int(match[1]), int(match[2] or match[1])
    if not (0 < height <= SIDE_MAX and 0 < width <= SIDE_MAX):
        raise ConfigError(f"--size {size}: expected 1 to {SIDE_MAX} pixels a side")
    return height, width


def parse_interval(interval: str | None) -> tuple[float, float]:
    """Parse two shares of the steps, e.g. "0.1,0.7".

    Raises:
        ConfigError: anything but two numbers from 0 to 1, the smaller first.
    """
    if interval is None:
        return 0.0, 1.0
    match = re.fullmatch(r"\s*([\d.]+)\s*,\s*([\d.]+)\s*", interval)
    try:
        first, last = (float(share) for share in match.groups()) if match else (1.0, 0.0)
    except ValueError:
        first, last = 1.0, 0.0
    if not 0.0 <= first < last <= 1.0:
        raise ConfigError(f"--guidance-interval {interval}: expected two shares of the steps, e.g. 0.1,0.7")
    return first, last


def parse_adapter(text: str) -> tuple[str, float]:
    """Parse FILE or FILE:SCALE, as --lora takes it; a colon that no number follows is part of the name.

    Raises:
        ConfigError: the scale is not finite, or no name is before it.
    """
    name, colon, tail = text.rpartition(":")
    try:
        scale = float(tail) if colon else 1.0
    except ValueError:
        return text, 1.0
    name = name if colon else text
    if not math.isfinite(scale) or not name:
        raise ConfigError(f"--lora {text}: expected FILE or FILE:SCALE, e.g. adapter.safetensors:0.8")
    return name, scale
