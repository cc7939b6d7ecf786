"""Choose the frames of a video that make a clip, and read only those.

The frames are exactly those of a full decode, chosen by timestamp: seek to a key frame before the first frame needed,
decode forward, and convert only the frames needed to pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from av.error import InvalidDataError
from torch import Tensor

from stdit_data.errors import DataError
from stdit_data.video.segments import FULL_VIDEO, Sampling, Segment, frame_numbers, slack_seconds
from stdit_data.video.stream import VideoStream

Convert = Callable[[Any], Tensor]  # a decoded av.VideoFrame to a picture [C, H, W]


@dataclass(frozen=True, slots=True)
class ReadFrames:
    """The frames of a clip, as pictures."""

    pictures: list[Tensor]  # [C, H, W] each
    times: list[float]  # seconds from the video's first frame; a held frame keeps its own time
    fps: float  # frame rate of the clip


def read_frames(
    video: VideoStream, sampling: Sampling, convert: Convert, *, place: float = 0.0, segment: Segment = FULL_VIDEO
) -> ReadFrames:
    """Read the frames of a clip.

    Args:
        video: the open stream.
        sampling: which frames to read.
        convert: converts a decoded frame to a picture; called only for the frames of the clip.
        place: start of the clip among all possible starts, from 0 (earliest) to 1 (latest).
        segment: the part of the video that the clip may lie in.

    Raises:
        DataError: the video is too short, truncated or damaged.
        FFmpegError: the video is damaged so that FFmpeg can't continue.
    """
    low, high = segment.seconds(video.rate)
    # A segment with an end needs no pass over all packets of a long file: beyond the last frame none is found.
    total = video.count() if high is None or video.indexed else 2**62
    numbers = frame_numbers(low, high, video.rate, total)
    spare = len(numbers) - sampling.span(video.rate)
    if spare >= 0:
        # Fast path: trust the frame count. The middle of a frame's time is safe from rounding.
        if sampling.interval:
            start = (numbers[0] + min(int(place * (int(spare) + 1)), int(spare)) + Fraction(1, 2)) / video.rate
        else:
            start = (numbers[0] + Fraction(place) * spare) / video.rate
        # Invalid data may be the end of a truncated file, which `_read_by_timestamps` finds out.
        with suppress(InvalidDataError):
            clip = _read(video, sampling, convert, video.ticks(start), low, high, hold=False)
            if len(clip.pictures) == sampling.frames:
                return clip
    return _read_by_timestamps(video, sampling, convert, place, segment)


def _read_by_timestamps(
    video: VideoStream, sampling: Sampling, convert: Convert, place: float, segment: Segment
) -> ReadFrames:
    """Read a clip by the timestamps of all packets: for headers whose count or rate is missing or wrong."""
    stamps = video.timestamps()
    if video.packets < video.declared:
        raise DataError(f"truncated: {video.declared} frames declared, data for {video.packets}")
    clip, start = _read_among(stamps, video, sampling, convert, place, segment)
    if len(clip.pictures) < sampling.frames:  # some packets hold no frame: ask the decoder
        clip, start = _read_among([tick for tick, _ in video.all_frames()], video, sampling, convert, place, segment)
    if len(clip.pictures) < sampling.frames:
        raise DataError(f"damaged: only {len(clip.pictures)} of {sampling.frames} frames from {start} on decode")
    return clip


def _read_among(
    stamps: list[int], video: VideoStream, sampling: Sampling, convert: Convert, place: float, segment: Segment
) -> tuple[ReadFrames, int]:
    """Read a clip from a video whose frames are shown at `stamps`; return it and the tick that it starts at."""
    low, high = segment.seconds(video.rate)
    first, last = _bounds(video, low, high)
    within = [stamp for stamp in stamps if first <= stamp and (last is None or stamp < last)]
    if not within:
        length = video.seconds(stamps[-1]) if stamps else 0
        raise DataError(
            f"no frames in the segment, {segment}; the video has {len(stamps)} frames, the last at {length:.3f} s"
        )
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
    return _read(video, sampling, convert, start, low, high, hold=short), start


def _describe(sampling: Sampling) -> str:
    rate = f"interval {sampling.interval}" if sampling.interval else f"{sampling.fps:g} fps"
    hold = "short='hold', in a run `--set data.short=hold`, repeats the last frame"
    return f"{sampling.frames} frames at {rate} ({hold})"


def _bounds(video: VideoStream, low: Fraction, high: Fraction | None) -> tuple[int, int | None]:
    """[low, high) seconds as the first tick inside and the first tick after."""
    slack = max(slack_seconds(video.rate), video.slack)
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
    until = start + math.ceil((sampling.span(video.rate) - 1) / video.rate / video.time_base)
    frames = _within(video.frames_from(start, until), first, stop)
    collector = _FrameCollector(video, convert, sampling.frames)
    if sampling.interval:
        collector.collect_every(sampling.interval, frames)
    else:
        step = 1 / Fraction(sampling.fps or 1)
        begin = (start - video.first) * video.time_base
        collector.collect_at([video.ticks(begin + j * step) for j in range(sampling.frames)], frames)
    if hold:
        collector.hold()
    return ReadFrames(collector.pictures, collector.times, sampling.clip_fps(float(video.rate)))


def _within(frames: Iterator[tuple[int, Any]], first: int, stop: int | None) -> Iterator[tuple[int, Any]]:
    for tick, frame in frames:
        if stop is not None and tick >= stop:
            return
        if tick >= first:
            yield tick, frame


class _FrameCollector:
    """Converts the chosen ones of a sequence of decoded frames to pictures."""

    def __init__(self, video: VideoStream, convert: Convert, count: int) -> None:
        self.video, self.convert, self.count = video, convert, count
        self.pictures: list[Tensor] = []
        self.times: list[float] = []
        self._last: tuple[int, Any] | None = None  # the latest frame seen

    def collect_every(self, interval: int, frames: Iterator[tuple[int, Any]]) -> None:
        """Collect every `interval`-th frame."""
        for number, (tick, frame) in enumerate(frames):
            self._last = tick, frame
            if number % interval == 0:
                self._keep(tick, frame)
            if len(self.pictures) == self.count:
                return

    def collect_at(self, targets: Sequence[int], frames: Iterator[tuple[int, Any]]) -> None:
        """Collect the frames on screen at the ticks `targets`."""
        for tick, frame in frames:
            self._keep_before(tick, targets)
            if len(self.pictures) == self.count:
                return
            self._last = tick, frame
        if self._last is not None:  # the last frame's duration is unknown; targets may be a tick late
            self._keep_before(self._last[0] + 2, targets)

    def hold(self) -> None:
        """Repeat the last frame until the clip is full."""
        while self._last is not None and len(self.pictures) < self.count:
            self._keep(*self._last)

    def _keep_before(self, tick: int, targets: Sequence[int]) -> None:
        """Collect the latest frame once for each of the next targets that is before `tick`."""
        while self._last is not None and len(self.pictures) < self.count and targets[len(self.pictures)] < tick:
            self._keep(*self._last)

    def _keep(self, tick: int, frame: Any) -> None:
        if frame.is_corrupt:
            raise DataError(f"damaged at {self.video.seconds(tick):.3f} s")
        time = self.video.seconds(tick)
        repeated = bool(self.times) and self.times[-1] == time
        self.pictures.append(self.pictures[-1] if repeated else self.convert(frame))
        self.times.append(time)
