"""Which part of a video a clip is, and how its frames are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from stdit_data.errors import DataError

Short = Literal["skip", "hold"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the frames of a clip are chosen: every `interval`-th source frame, or at a rate of `fps`.

    Attributes:
        frames: number of frames of the clip.
        interval: read every n-th source frame (Open-Sora 1.0: 3 for 16 frames, 2 for 64). Excludes `fps`.
        fps: frames per second; each is the frame on screen at that moment, so frames repeat where the source is slower.
        short: what to do with a video that is too short: `skip` raises an error, `hold` repeats its last frame.

    Raises:
        DataError: a value is out of range, or not exactly one of `interval` and `fps` is given.
    """

    frames: int
    interval: int | None = None
    fps: float | None = None
    short: Short = "skip"

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise DataError(f"frames {self.frames}: expected at least 1")
        if (self.interval is None) == (self.fps is None):
            raise DataError(f"interval {self.interval} and fps {self.fps}: expected exactly one of the two")
        if self.interval is not None and self.interval < 1:
            raise DataError(f"interval {self.interval}: expected a whole number from 1")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise DataError(f"fps {self.fps}: expected a rate above 0")
        if self.short not in ("skip", "hold"):
            raise DataError(f"short {self.short!r}: expected 'skip' or 'hold'")

    def span(self, rate: Fraction | float) -> Fraction:
        """Return the number of source frames that a clip covers, at a source rate of `rate` frames per second."""
        interval = Fraction(self.interval) if self.interval else Fraction(rate) / Fraction(self.fps or 1)
        return (self.frames - 1) * interval + 1

    def clip_fps(self, rate: float) -> float:
        """Return the frame rate of the clip, for a source rate of `rate` frames per second."""
        return rate / self.interval if self.interval else float(self.fps or rate)


def default_sampling(
    frames: int, interval: int | None = None, fps: float | None = None, short: Short = "skip"
) -> Sampling:
    """Make a `Sampling`; without `interval` and `fps`, with Open-Sora 1.0's interval: 3 up to 16 frames, else 2."""
    if interval is None and fps is None:
        interval = 3 if frames <= 16 else 2
    return Sampling(frames, interval=interval, fps=fps, short=short)


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a video, given in seconds or in frames; the end is exclusive.

    Frame numbers are converted to times at the video's average rate. None stands for the video's own start or end.
    """

    start: float | None = None  # seconds
    end: float | None = None  # seconds
    start_frame: int | None = None
    end_frame: int | None = None

    def seconds(self, rate: Fraction) -> tuple[Fraction, Fraction | None]:
        """Return start and end in seconds, at `rate` frames per second."""
        start, end = self.start, self.end
        low = Fraction(start) if start is not None else Fraction(self.start_frame or 0) / rate
        high = Fraction(end) if end is not None else None if self.end_frame is None else self.end_frame / rate
        return low, high

    def frames(self, rate: float, total: int) -> int:
        """Return how many of a video's `total` frames lie within the segment, at `rate` frames per second."""
        return len(frame_numbers(*self.seconds(Fraction(rate)), Fraction(rate), total))

    def __str__(self) -> str:
        if self.start is not None or self.end is not None:
            return f"{self.start or 0:g} to {'the end' if self.end is None else f'{self.end:g}'} s"
        return f"frames {self.start_frame or 0} to {'the end' if self.end_frame is None else self.end_frame}"


FULL_VIDEO = Segment()


def frame_numbers(low: Fraction, high: Fraction | None, rate: Fraction, total: int) -> range:
    """Return the frames within [low, high) seconds of a video with `total` frames at a constant rate."""
    slack = slack_seconds(rate)
    first = math.ceil((low - slack) * rate)
    stop = total if high is None else min(total, math.ceil((high - slack) * rate))
    return range(first, max(first, stop))


def slack_seconds(rate: Fraction) -> Fraction:
    """Return by how many seconds a segment's bounds may be off, below half a frame: manifests round to milliseconds."""
    return min(Fraction(1, 1000), 1 / (4 * rate))
