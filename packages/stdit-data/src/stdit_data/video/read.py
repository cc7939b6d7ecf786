"""A whole picture or video as pixels, without a manifest: what a sample is to go on from.

C channels (3), T frames, H height, W width.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from stdit_data import files
from stdit_data.datasets.videos import _Convert
from stdit_data.errors import ClipError
from stdit_data.transforms import Fit, normalise
from stdit_data.video.frames import Sampling, take
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
        taken = take(video, sampling, _Convert(Fit(height, width), video))
    return torch.stack(taken.pictures, dim=1), taken.fps
