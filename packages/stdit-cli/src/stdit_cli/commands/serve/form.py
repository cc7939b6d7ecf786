"""From what was filled in on the page, or sent in its place, to a request like one of `stdit sample`."""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stdit_cli.commands.sample.command import make_request
from stdit_cli.commands.sample.request import SEED_MAX, SampleRequest, Settings
from stdit_cli.commands.serve.limits import Limits
from stdit_train.errors import ConfigError

GUIDANCE_MAX = 30.0


@dataclass(frozen=True)
class Form:
    """The fields of the page in their order, as they arrive: of any type. None or "" means the checkpoint's own.

    Attributes:
        prompt, negative: texts.
        checkpoint: one of the names that are offered.
        image: the uploaded picture, as Gradio sends it.
        seed, steps, frames, height, width: whole numbers.
        guidance: a number.
    """

    prompt: Any = None
    negative: Any = None
    checkpoint: Any = None
    image: Any = None
    seed: Any = None
    steps: Any = None
    guidance: Any = None
    frames: Any = None
    height: Any = None
    width: Any = None

    def to_request(self, base: Settings, limits: Limits, folder: Path) -> SampleRequest:
        """Check all fields and return the request.

        Args:
            base: the settings that the page does not offer, with one of the offered names as the checkpoint.
            limits: for this checkpoint.
            folder: that pictures are uploaded to.

        Raises:
            ConfigError: a field of the wrong type or beyond its limit, or settings that do not fit each other.
            SettingsError: a text without words.
        """
        prompt, negative = _text("prompt", self.prompt, limits), _text("negative prompt", self.negative, limits)
        frames = _whole("frames", self.frames, 1, limits.frames)
        height, width = (_whole(side, getattr(self, side), 8, limits.size) for side in ("height", "width"))
        if (height is None) != (width is None):
            raise ConfigError("height and width: give both, or leave both empty")
        settings = {
            **asdict(base),
            "image": _uploaded(self.image, folder),
            "frames": frames,
            "size": None if height is None else f"{height}x{width}",
            "steps": _whole("steps", self.steps, 1, limits.steps),
            "guidance": _number("guidance", self.guidance, 0.0, GUIDANCE_MAX),
        }
        options = {"negative": negative, "seed": _whole("seed", self.seed, 0, SEED_MAX) or 0}
        return make_request([prompt], [], None, settings, options)


def _text(name: str, value: Any, limits: Limits) -> str:
    if not isinstance(value, str | None):
        raise ConfigError(f"{name}: expected a text")
    text = (value or "").strip()
    if len(text) > limits.prompt:
        raise ConfigError(f"{name}: {len(text)} characters; at most {limits.prompt} are allowed here")
    return text


def _number(name: str, value: Any, low: float, high: float | None) -> float | None:
    if value is None or value == "":
        return None
    assert high is not None
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high:
        raise ConfigError(f"{name} {str(value)[:40]}: expected a number from {low:g} to {high:g}")
    return float(value)


def _whole(name: str, value: Any, low: int, high: int | None) -> int | None:
    if value is None or value == "":
        return None
    assert high is not None
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value != int(value) or not low <= value <= high:
        raise ConfigError(f"{name} {str(value)[:40]}: expected a whole number from {low} to {high}")
    return int(value)


def _uploaded(value: Any, folder: Path) -> str | None:
    """Return the path of an uploaded picture."""
    if value is None:
        return None
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str) or not is_inside(path, folder) or not Path(path).is_file():
        raise ConfigError("image: upload a .png, .jpg or .webp file")
    return str(Path(path).resolve())


def is_inside(path: str, folder: Path) -> bool:
    """Tell whether a path is absolute and leads into a folder, with links and `..` followed."""
    if "\0" in path or len(path) > 4096 or not Path(path).is_absolute():
        return False
    try:
        return Path(path).resolve().is_relative_to(folder.resolve())
    except OSError:
        return False


def on_page(message: str) -> str:
    """Show a message of the command line as one of the page: options by their names alone, without markup."""
    line = " ".join(re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", " "), message).split())
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        line = line.replace(letter, entity)
    return line
