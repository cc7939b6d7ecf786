"""Decode the frames of a manifest's row that the steps analyse: once, at a low rate and a small size.

T frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from av.video.reformatter import VideoReformatter
from torch import Tensor

from stdit_data.errors import DataError
from stdit_data.storage import files
from stdit_data.video import color
from stdit_data.video.deinterlace import TopField
from stdit_data.video.pictures import is_still, open_video, read_image
from stdit_data.video.probe import reads_clip
from stdit_data.video.segments import Segment
from stdit_data.video.stream import VideoStream

Array = np.ndarray[Any, Any]
_cv2: Any = cv2  # its type stubs lack some functions
FULL_SIZE_FRAMES = 3  # kept at full size, for what a smaller picture hides
MOST_FRAMES = 240  # of a clip: two minutes at 2 a second; what comes later is not looked at


@dataclass
class ClipFrames:
    """The decoded frames of a clip.

    Attributes:
        rgb: [T, H, W, 3] uint8, the longer side as asked for or smaller.
        times: seconds of each from the video's first frame.
        full: up to `FULL_SIZE_FRAMES` luma pictures [H, W] uint8 at full size, evenly spread.
        width, height: of the video in pixels, as shown.
        fps: of the video; 0 for an image.
        seconds: length of the clip; 0 for an image.
        num_frames: frames in the whole video.
        caption: the row's caption.
    """

    rgb: Array
    times: list[float]
    full: list[Array]
    width: int
    height: int
    fps: float
    seconds: float
    num_frames: int
    caption: str = ""

    @cached_property
    def grey(self) -> Array:
        """Return the luma, [T, H, W] uint8."""
        return np.stack([cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in self.rgb])

    @cached_property
    def flow(self) -> list[Array]:
        """Return the optical flow (DIS) between consecutive frames, [H, W, 2] in pixels, x rightwards, y downwards."""
        dis = _cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        pairs = zip(self.grey[:-1], self.grey[1:], strict=True)
        return [np.asarray(dis.calc(before, after, None)) for before, after in pairs]


@reads_clip
def read_clip(url: str, segment: Segment, *, fps: float = 2.0, size: int = 256) -> ClipFrames:
    """Decode a clip's frames at a rate: from its first frame on, the frame that is on screen at each time.

    Args:
        url: the video or image.
        segment: the part of it that counts.
        fps: frames a second.
        size: the longer side in pixels; smaller pictures keep theirs.

    Raises:
        ClipError: missing, damaged, no video, or no frame in the segment.
    """
    with files.open_media(url) as media:
        if is_still(url, media):
            picture = _rgb(read_image(media))
            height, width = picture.shape[:2]
            return ClipFrames(_shrunk(picture, size)[None], [0.0], [_luma(picture)], width, height, 0.0, 0.0, 1)
        with open_video(url, media) as video:
            convert = FrameConverter(video)
            small, times, full = [], [], _Spread()
            for tick, frame in _at_rate(video, segment, fps):
                picture = convert(frame)
                small.append(_shrunk(picture, size))
                times.append(video.seconds(tick))
                full.add(_luma(picture))
            if not small:
                raise DataError(f"no frames in the cut, {segment}")
            height, width = picture.shape[:2]
            low, high = _span(video, segment)
            length = max(high - low, times[-1] - low)
            rate = float(video.rate)
            return ClipFrames(np.stack(small), times, full.pictures(), width, height, rate, length, video.count())


@reads_clip
def frames_at(url: str, segment: Segment, shares: Sequence[float], *, size: int | None = None) -> list[Array]:
    """Decode the frames on screen at shares of a clip's length, as [H, W, 3] uint8; for an image its one picture.

    Args:
        url: the video or image.
        segment: the part of it that counts.
        shares: of the length, 0 to 1.
        size: the longer side in pixels; full size by default.

    Raises:
        ClipError: missing, damaged, no video, or no frame in the segment.
    """
    with files.open_media(url) as media:
        if is_still(url, media):
            return [_shrunk(_rgb(read_image(media)), size)]
        with open_video(url, media) as video:
            convert = FrameConverter(video)
            low, high = _span(video, segment)
            pictures: list[Array] = []
            for share in shares:
                # Not the very end: how long the last frame stays on screen is not known.
                moment = min(low + share * (high - low), high - 1 / float(video.rate))
                _, frame = next(video.frames_from(video.ticks(max(low, moment))), (0, None))
                if frame is None or frame.is_corrupt:
                    raise DataError(f"no frame decodes at {moment:.3f} s")
                pictures.append(_shrunk(convert(frame), size))
            return pictures


class FrameConverter:
    """Converts decoded frames of a video to [H, W, 3] uint8 RGB: upright, square pixels, one field, SDR."""

    def __init__(self, video: VideoStream) -> None:
        self.aspect, self.alpha, self.reformatter = video.aspect, video.alpha, VideoReformatter()
        self.top_field = TopField(video.codec)

    def __call__(self, frame: Any) -> Array:
        one = self.top_field(frame)
        picture = color.to_rgb(one, self.reformatter, alpha=self.alpha)
        if color.is_hdr(one):
            picture = color.tone_map(picture, one.color_trc).mul(255).round().byte()
        pixels = _rgb(picture)
        aspect = self.aspect * one.height / frame.height  # a field's lines are as high as two
        aspect = 1 / aspect if color.is_rotated(one) else aspect
        if aspect != 1:
            height, width = pixels.shape[:2]
            pixels = cv2.resize(pixels, (max(1, round(width * aspect)), height), interpolation=cv2.INTER_AREA)
        return pixels


class _Spread:
    """Keeps a few evenly spaced pictures of a stream of unknown length."""

    def __init__(self) -> None:
        self.kept: list[Array] = []
        self.seen, self.step = 0, 1

    def add(self, picture: Array) -> None:
        if self.seen % self.step == 0:
            self.kept.append(picture)
        self.seen += 1
        if len(self.kept) > 4 * FULL_SIZE_FRAMES:
            self.kept, self.step = self.kept[::2], 2 * self.step

    def pictures(self) -> list[Array]:
        places = np.linspace(0, len(self.kept) - 1, FULL_SIZE_FRAMES)
        return [self.kept[place] for place in sorted({round(place) for place in places})]


def _span(video: VideoStream, segment: Segment) -> tuple[float, float]:
    """Return start and end of the segment in seconds; without an end, the end that the file declares."""
    low, high = segment.seconds(video.rate)
    return float(low), video.duration if high is None else float(high)


def frames_within(video: VideoStream, segment: Segment) -> Iterator[tuple[int, Any]]:
    """Yield (tick, frame) of every frame in the segment.

    Raises:
        DataError: a frame is damaged.
    """
    low, high = segment.seconds(video.rate)
    slack = max(min(Fraction(1, 1000), 1 / (4 * video.rate)), video.slack)  # manifests round to milliseconds
    first = video.first + math.ceil((low - slack) / video.time_base)
    stop = None if high is None else video.first + math.ceil((high - slack) / video.time_base)
    frames = video.all_frames() if low == 0 else video.frames_from(first)
    for tick, frame in frames:
        if stop is not None and tick >= stop:
            return
        if frame.is_corrupt:
            raise DataError(f"damaged at {video.seconds(tick):.3f} s")
        if tick >= first:
            yield tick, frame


def _at_rate(video: VideoStream, segment: Segment, fps: float) -> Iterator[tuple[int, Any]]:
    """Yield (tick, frame) of the frames on screen at a rate, from the segment's first; at most `MOST_FRAMES`."""
    step = 1 / Fraction(fps).limit_denominator(1000)
    current: tuple[int, Any] | None = None
    start, given = Fraction(0), 0
    for tick, frame in frames_within(video, segment):
        moment = (tick - video.first) * video.time_base
        if current is None:
            start = moment
        elif moment > start + given * step + video.slack:
            yield current
            given += 1
            while start + given * step + video.slack < moment:  # the source is slower than the rate: no repeats
                given += 1
        if given >= MOST_FRAMES:
            return
        current = tick, frame
    if current is not None and (current[0] - video.first) * video.time_base + video.slack >= start + given * step:
        yield current


def _rgb(picture: Tensor) -> Array:
    """Convert [3, H, W] to contiguous [H, W, 3]."""
    return np.ascontiguousarray(picture.permute(1, 2, 0).numpy())


def _luma(picture: Array) -> Array:
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))


def _shrunk(picture: Array, size: int | None) -> Array:
    height, width = picture.shape[:2]
    if size is None or max(height, width) <= size:
        return picture
    scale = size / max(height, width)
    target = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(picture, target, interpolation=cv2.INTER_AREA))
