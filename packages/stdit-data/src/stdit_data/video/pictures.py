"""Read picture files: still ones as pixels, animated ones as videos."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stdit_data.errors import DataError
from stdit_data.storage import urls
from stdit_data.video.stream import VideoStream

ANIMATED = frozenset((".png", ".webp"))  # suffixes of pictures that may be animations
MILLISECOND = Fraction(1, 1000)


def is_still(url: str, media: str | IO[bytes]) -> bool:
    """Return whether a file is a picture by its suffix, and not an animated WebP or PNG, which is a video.

    Args:
        url: path or URL of the file.
        media: the open file, see `files.open_media`.
    """
    if not urls.is_image(url):
        return False
    if urls.suffix(url) not in ANIMATED:
        return True
    with Image.open(media) as image:
        return not getattr(image, "is_animated", False)


def open_video(url: str, media: str | IO[bytes], stream: int | None = None) -> VideoStream:
    """Open a video or an animated picture.

    Args:
        url: path or URL of the file.
        media: the open file, see `files.open_media`.
        stream: number of the video stream, see `VideoStream`.

    Raises:
        FFmpegError, OSError, DataError: as `VideoStream` does.
    """
    return AnimatedWebP(media) if urls.suffix(url) == ".webp" else VideoStream(media, stream)


def read_image(media: str | IO[bytes]) -> Tensor:
    """Read an image upright by its EXIF tag, on white where it is transparent.

    Args:
        media: path or open binary file.

    Returns:
        [3, H, W] uint8.
    """
    with Image.open(media) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):
            grey = np.asarray(upright, dtype=np.float32)
            top = 65535 if upright.mode != "F" else max(1.0, float(grey.max()))
            upright = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
        if upright.has_transparency_data:
            paper = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(paper, upright.convert("RGBA"))
        pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


class AnimatedWebP(VideoStream):
    """An animated WebP as a video stream: decoded by Pillow from the start, since FFmpeg does not decode it."""

    def __init__(self, media: str | IO[bytes]) -> None:
        self._image = Image.open(media)
        self.codec, self.streams, self.alpha = "webp", 1, True
        self.declared = self.packets = 0
        self.timed, self.first, self.time_base = True, 0, MILLISECOND
        self._ends: list[int] = []  # milliseconds at which each frame leaves the screen
        for _ in self._pictures():
            shown = int(self._image.info.get("duration") or 0)
            self._ends.append(shown + (self._ends[-1] if self._ends else 0))
        if not self._ends or self._ends[-1] < len(self._ends):
            raise DataError("an animation without frame times")
        self.rate = len(self._ends) / (self._ends[-1] * MILLISECOND)

    def _pictures(self) -> Iterator[Image.Image]:
        for number in range(getattr(self._image, "n_frames", 1)):
            self._image.seek(number)
            self._image.load()
            yield self._image

    def reopen(self) -> None:
        """Do nothing: every pass starts from the first frame."""

    def close(self) -> None:
        """Close the file."""
        self._image.close()

    @property
    def aspect(self) -> float:
        """Pixel aspect ratio, width over height."""
        return 1.0

    @property
    def indexed(self) -> bool:
        """Whether the number of frames is known without a pass over the file."""
        return True

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self._ends[-1] / 1000

    def count(self) -> int:
        """Return the number of frames."""
        return len(self._ends)

    def timestamps(self) -> list[int]:
        """Return the ticks of all frames in order."""
        return [0, *self._ends[:-1]]

    def all_frames(self) -> Iterator[tuple[int, Any]]:
        """Decode all frames, as (tick, frame)."""
        for tick, picture in zip(self.timestamps(), self._pictures(), strict=True):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture.convert("RGBA")), format="rgba")
            frame.pts, frame.time_base = tick, MILLISECOND
            yield tick, frame

    def frames_from(self, tick: int, until: int | None = None) -> Iterator[tuple[int, Any]]:
        """Decode from the frame on screen at `tick`, as (tick, frame)."""
        shown = max((stamp for stamp in self.timestamps() if stamp <= tick), default=0)
        return (pair for pair in self.all_frames() if pair[0] >= shown)
