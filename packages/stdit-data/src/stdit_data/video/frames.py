"""Which frames of a video make a clip, and reading just those.

The frames are exactly those of a full decode, chosen by timestamp: seek to a key frame before the first one wanted,
decode forward, keep what is wanted. Nothing else is turned into pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from av.error import InvalidDataError
from torch import Tensor

from stdit_data.errors import DataError
from stdit_data.video.stream import VideoStream

Short = Literal["skip", "hold"]
Convert = Callable[[Any], Tensor]  # a decoded av.VideoFrame to a picture


@dataclass(frozen=True, slots=True)
class Sampling:
    """How frames are taken from a video.

    Attributes:
        frames: how many.
        interval: every how many source frames (1: all; Open-Sora 1.0 takes 3 at 16 frames, 2 at 64); or
        fps: at this rate: at each moment the frame on screen, so frames repeat where the source is slower.
        short: what to do with a video that is too short: `skip` (an error that says so), or `hold` its last frame.
    """

    frames: int
    interval: int | None = None
    fps: float | None = None
    short: Short = "skip"

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise DataError(f"frames {self.frames}: expected at least 1")
        if (self.interval is None) == (self.fps is None):
            raise DataError(f"interval {self.interval} and fps {self.fps}: expected one of the two")
        if self.interval is not None and self.interval < 1:
            raise DataError(f"interval {self.interval}: expected a whole number from 1")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise DataError(f"fps {self.fps}: expected a rate above 0")
        if self.short not in ("skip", "hold"):
            raise DataError(f"short {self.short!r}: expected 'skip' or 'hold'")

    def span(self, rate: Fraction | float) -> Fraction:
        """Source frames from the first to the last wanted, both counted, at `rate` frames a second."""
        interval = Fraction(self.interval) if self.interval else Fraction(rate) / Fraction(self.fps or 1)
        return (self.frames - 1) * interval + 1

    def played(self, rate: float) -> float:
        """Frames a second of what is taken from a source of `rate`."""
        return rate / self.interval if self.interval else float(self.fps or rate)


def default_sampling(
    frames: int, interval: int | None = None, fps: float | None = None, short: Short = "skip"
) -> Sampling:
    """A `Sampling` with Open-Sora 1.0's interval where neither interval nor fps is given: 3 up to 16 frames, else 2."""
    if interval is None and fps is None:
        interval = 3 if frames <= 16 else 2
    return Sampling(frames, interval=interval, fps=fps, short=short)


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a video that an entry means: from `start` up to but without `end`, in seconds or in frames (which
    are counted at the video's average rate). None is the video's own start or end."""

    start: float | None = None
    end: float | None = None
    start_frame: int | None = None
    end_frame: int | None = None

    def seconds(self, rate: Fraction) -> tuple[Fraction, Fraction | None]:
        """Start and end in seconds at `rate` frames a second."""
        start, end = self.start, self.end
        low = Fraction(start) if start is not None else Fraction(self.start_frame or 0) / rate
        high = Fraction(end) if end is not None else None if self.end_frame is None else self.end_frame / rate
        return low, high

    def frames(self, rate: float, total: int) -> int:
        """How many of a video's `total` frames lie within, at `rate` frames a second."""
        return len(_numbers(*self.seconds(Fraction(rate)), Fraction(rate), total))

    def __str__(self) -> str:
        if self.start is not None or self.end is not None:
            return f"{self.start or 0:g} to {'the end' if self.end is None else f'{self.end:g}'} s"
        return f"frames {self.start_frame or 0} to {'the end' if self.end_frame is None else self.end_frame}"


WHOLE = Segment()


@dataclass(frozen=True, slots=True)
class ReadFrames:
    """The pictures read, where they were, and how fast they play."""

    pictures: list[Tensor]
    times: list[float]  # seconds from the video's first frame; a held frame keeps its own
    fps: float


def read_frames(
    video: VideoStream, sampling: Sampling, convert: Convert, *, place: float = 0.0, cut: Segment = WHOLE
) -> ReadFrames:
    """Reads a clip.

    Args:
        video: an open stream.
        sampling: which frames.
        convert: makes a picture of a frame; called for the frames wanted alone.
        place: where among all possible starts, 0 (the earliest) to 1 (the latest).
        cut: the part of the video that counts.

    Raises:
        DataError: too short, truncated or damaged.
        FFmpegError: damaged so that FFmpeg can't go on.
    """
    low, high = cut.seconds(video.rate)
    numbers = _numbers(low, high, video.rate, video.count())
    spare = len(numbers) - sampling.span(video.rate)
    if spare >= 0:
        # Fast: trust the count. The middle of a frame's time is safe from rounding, for a start counted in frames.
        if sampling.interval:
            start = (numbers[0] + min(int(place * (int(spare) + 1)), int(spare)) + Fraction(1, 2)) / video.rate
        else:
            start = (numbers[0] + Fraction(place) * spare) / video.rate
        # Invalid data may be the end of a truncated file, which the exact way finds out.
        with suppress(InvalidDataError):
            taken = _read(video, sampling, convert, video.ticks(start), low, high, hold=False)
            if len(taken.pictures) == sampling.frames:
                return taken
    return _take_exactly(video, sampling, convert, place, cut)


def _take_exactly(video: VideoStream, sampling: Sampling, convert: Convert, place: float, cut: Segment) -> ReadFrames:
    """Reads a clip by the timestamps of all packets, for files whose header has no count and rate, or wrong ones."""
    low, high = cut.seconds(video.rate)
    stamps = video.timestamps()
    if video.packets < video.declared:
        raise DataError(f"truncated: {video.declared} frames declared, data for {video.packets}")
    first, last = _bounds(video, low, high)
    within = [stamp for stamp in stamps if first <= stamp and (last is None or stamp < last)]
    if not within:
        whole = video.seconds(stamps[-1]) if stamps else 0
        raise DataError(f"no frames in the cut, {cut}; the video has {len(stamps)} frames, the last at {whole:.3f} s")
    if sampling.interval:
        spare = len(within) - int(sampling.span(video.rate))
        start = within[min(int(place * (spare + 1)), spare)] if spare > 0 else within[0]
        short = spare < 0
    else:
        spare = within[-1] - within[0] - int((sampling.frames - 1) / Fraction(sampling.fps or 1) / video.time_base)
        start = within[0] + int(place * max(0, spare))
        short = spare < 0
    if short and sampling.short == "skip":
        need = math.ceil(sampling.span(video.rate))
        raise DataError(f"too short: {len(within)} frames, {need} needed for {_describe(sampling)}")
    taken = _read(video, sampling, convert, start, low, high, hold=short)
    if len(taken.pictures) < sampling.frames:
        raise DataError(f"damaged: only {len(taken.pictures)} of {sampling.frames} frames from {start} on decode")
    return taken


def _describe(sampling: Sampling) -> str:
    how = f"interval {sampling.interval}" if sampling.interval else f"{sampling.fps:g} fps"
    return f"{sampling.frames} frames at {how} (short='hold' would hold the last)"


def _numbers(low: Fraction, high: Fraction | None, rate: Fraction, total: int) -> range:
    """The numbers of the frames within [low, high) of a video with `total` frames at a constant rate."""
    slack = _slack(rate)
    first = math.ceil((low - slack) * rate)
    stop = total if high is None else min(total, math.ceil((high - slack) * rate))
    return range(first, max(first, stop))


def _slack(rate: Fraction) -> Fraction:
    """Seconds by which a cut may be off: manifests round to milliseconds. Less than half a frame."""
    return min(Fraction(1, 1000), 1 / (4 * rate))


def _bounds(video: VideoStream, low: Fraction, high: Fraction | None) -> tuple[int, int | None]:
    """[low, high) as the first tick within and the first no longer within."""
    slack = max(_slack(video.rate), video.slack)
    first = video.first + math.ceil((low - slack) / video.time_base)
    return first, None if high is None else video.first + math.ceil((high - slack) / video.time_base)


def _read(
    video: VideoStream,
    sampling: Sampling,
    convert: Convert,
    start: int,
    low: Fraction,
    high: Fraction | None,
    *,
    hold: bool,
) -> ReadFrames:
    first, stop = _bounds(video, low, high)
    frames = _within(video.frames_from(start), first, stop)
    picker = _Picker(video, convert, sampling.frames)
    if sampling.interval:
        picker.by_count(frames, sampling.interval)
    else:
        step = 1 / Fraction(sampling.fps or 1)
        begin = (start - video.first) * video.time_base
        picker.by_time(frames, [video.ticks(begin + j * step) for j in range(sampling.frames)])
    if hold:
        picker.hold()
    return ReadFrames(picker.pictures, picker.times, sampling.played(float(video.rate)))


def _within(frames: Iterator[tuple[int, Any]], first: int, stop: int | None) -> Iterator[tuple[int, Any]]:
    for tick, frame in frames:
        if stop is not None and tick >= stop:
            return
        if tick >= first:
            yield tick, frame


class _Picker:
    """Converts the frames wanted as they pass by."""

    def __init__(self, video: VideoStream, convert: Convert, count: int) -> None:
        self.video, self.convert, self.count = video, convert, count
        self.pictures: list[Tensor] = []
        self.times: list[float] = []
        self._last: tuple[int, Any] | None = None  # the last frame that passed by

    def by_count(self, frames: Iterator[tuple[int, Any]], interval: int) -> None:
        """Every `interval`-th frame."""
        for number, (tick, frame) in enumerate(frames):
            self._last = tick, frame
            if number % interval == 0:
                self._keep(tick, frame)
            if len(self.pictures) == self.count:
                return

    def by_time(self, frames: Iterator[tuple[int, Any]], targets: Sequence[int]) -> None:
        """The frames on screen at `targets`."""
        for tick, frame in frames:
            self._keep_before(tick, targets)
            if len(self.pictures) == self.count:
                return
            self._last = tick, frame
        if self._last is not None:  # how long the last frame stays on screen is not known; targets may be a tick late
            self._keep_before(self._last[0] + 2, targets)

    def hold(self) -> None:
        """Fills up with the last frame."""
        while self._last is not None and len(self.pictures) < self.count:
            self._keep(*self._last)

    def _keep_before(self, tick: int, targets: Sequence[int]) -> None:
        """The last frame, for each of the next targets that is before `tick`."""
        while self._last is not None and len(self.pictures) < self.count and targets[len(self.pictures)] < tick:
            self._keep(*self._last)

    def _keep(self, tick: int, frame: Any) -> None:
        if frame.is_corrupt:
            raise DataError(f"damaged at {self.video.seconds(tick):.3f} s")
        time = self.video.seconds(tick)
        repeated = bool(self.times) and self.times[-1] == time
        self.pictures.append(self.pictures[-1] if repeated else self.convert(frame))
        self.times.append(time)
