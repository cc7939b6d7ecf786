"""Read images and videos as tensors in the model's size and range.
C channels (3), T frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from stdit_data.errors import ClipError
from stdit_data.storage import files, urls
from stdit_data.transforms import Fit, normalise, stack_videos, to_float
from stdit_data.video import color
from stdit_data.video.deinterlace import TopField
from stdit_data.video.frames import read_frames
from stdit_data.video.pictures import is_still, open_video, read_image
from stdit_data.video.probe import reads_clip
from stdit_data.video.segments import Sampling
from stdit_data.video.stream import VideoStream


class FrameConverter:
    """Converts the decoded frames of one clip to pictures: deinterlace, RGB, resize, crop, flip, tone map.

    Args:
        fit: size, crop and flip, the same for all frames; its `aspect` is replaced by the stream's.
        video: the stream that the frames come from.
    """

    def __init__(self, fit: Fit, video: VideoStream) -> None:
        self.fit, self.aspect, self.alpha, self.reformatter = fit, video.aspect, video.alpha, VideoReformatter()
        self.top_field = TopField(video.codec)

    def __call__(self, frame: Any) -> Tensor:
        """Convert an `av.VideoFrame` to [C, H, W] uint8 or, where it is HDR, float32 in [-1, 1]."""
        field = self.top_field(frame)
        aspect = self.aspect * field.height / frame.height  # a line of a field is as high as two lines of the frame
        aspect = 1 / aspect if color.is_rotated(field) else aspect
        rgb = color.to_rgb(field, self.reformatter, alpha=self.alpha)
        picture = replace(self.fit, aspect=aspect)(rgb)
        if color.is_hdr(field):
            picture = color.tone_map(picture, field.color_trc)
        return picture if picture.dtype == torch.uint8 else normalise(picture)


@reads_clip
def read_picture(url: str, height: int, width: int) -> Tensor:
    """Read an image, scaled to cover `height` x `width` pixels and centre-cropped.

    Returns:
        [3, H, W] float32 in [-1, 1].

    Raises:
        ClipError: the file is missing, not an image, or damaged.
    """
    if not urls.is_image(url):
        raise ClipError(url, "not an image by its suffix; expected .png, .jpg or .webp")
    with files.open_media(url) as media:
        if not is_still(url, media):
            raise ClipError(url, "an animation, expected a single picture; give it as a video")
        return normalise(Fit(height, width)(read_image(media)))


@reads_clip
def read_video(url: str, height: int, width: int, fps: float | None = None) -> tuple[Tensor, float]:
    """Read all of a video, scaled to cover `height` x `width` pixels and centre-cropped.

    Args:
        url: path or URL.
        height, width: size in pixels.
        fps: frame rate to resample to, in frames per second; without it every frame is read at the video's own rate.

    Returns:
        [3, T, H, W] float32 in [-1, 1], and the frame rate in frames per second.

    Raises:
        ClipError: the file is missing, not a video, or damaged.
    """
    with files.open_media(url) as media:
        if is_still(url, media):
            raise ClipError(url, "expected a video, found an image")
        with open_video(url, media) as video:
            count = video.count()
            if fps is None:
                sampling = Sampling(count, interval=1)
            else:
                frames = int((count - 1) * Fraction(fps).limit_denominator(10**6) / video.rate) + 1
                sampling = Sampling(frames, fps=fps, short="hold")
            clip = read_frames(video, sampling, FrameConverter(Fit(height, width), video))
    return to_float(stack_videos(clip.pictures, dim=1)), clip.fps
