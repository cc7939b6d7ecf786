"""A whole picture or video as pixels, without a manifest: what a sample is to go on from.

C channels (3), T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from stdit_data import files
from stdit_data.errors import ClipError
from stdit_data.transforms import Fit, normalise
from stdit_data.video import color
from stdit_data.video.deinterlace import OneField
from stdit_data.video.frames import Sampling, read_frames
from stdit_data.video.probe import read_image, reading
from stdit_data.video.stream import VideoStream


def read_picture(url: str, height: int, width: int) -> Tensor:
    """A picture, scaled to cover height x width and cut to its centre: [3, H, W] in [-1, 1].

    Raises:
        ClipError: missing, no picture, or damaged.
    """
    if not files.is_image(url):
        raise ClipError(url, "not a picture by its suffix; give a png, jpg or webp")
    with reading(url), files.open_media(url) as media:
        return normalise(Fit(height, width)(read_image(media)))


def read_video(url: str, height: int, width: int, fps: float | None = None) -> tuple[Tensor, float]:
    """All of a video, scaled to cover height x width and cut to its centre: [3, T, H, W] in [-1, 1], and its rate.

    Args:
        url: a path or URL.
        height, width: in pixels.
        fps: frames a second to take it at: at each moment the frame on screen. Its own unless given.

    Raises:
        ClipError: missing, no video, or damaged.
    """
    if files.is_image(url):
        raise ClipError(url, "a picture, where a video is expected")
    with reading(url), files.open_media(url) as media, VideoStream(media) as video:
        count = video.count()
        if fps is None:
            sampling = Sampling(count, interval=1)
        else:
            frames = int((count - 1) * Fraction(fps).limit_denominator(10**6) / video.rate) + 1
            sampling = Sampling(frames, fps=fps, short="hold")
        taken = read_frames(video, sampling, _Convert(Fit(height, width), video))
    return torch.stack(taken.pictures, dim=1), taken.fps


class _Convert:
    """A decoded frame to [C, H, W] float32 in [-1, 1], the same way for all frames of a clip."""

    def __init__(self, fit: Fit, video: VideoStream) -> None:
        self.fit, self.aspect, self.reformatter = fit, video.aspect, VideoReformatter()
        self.one_field = OneField(video.video.codec_context.name)

    def __call__(self, frame: Any) -> Tensor:
        field = self.one_field(frame)
        aspect = self.aspect * field.height / frame.height  # a field's lines are as high as two
        aspect = 1 / aspect if color.turned(field) else aspect
        picture = replace(self.fit, aspect=aspect)(color.to_rgb(field, self.reformatter))
        if color.is_hdr(field):
            picture = color.tone_map(picture, field.color_trc)
        return normalise(picture)
