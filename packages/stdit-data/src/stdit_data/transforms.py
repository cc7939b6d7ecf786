"""Bring pictures to the model's size and range: resize, crop, flip, normalise.

C channels (3), H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_data.errors import DataError

# Mirroring a clip would make a caption with one of these words wrong.
SIDES = re.compile(
    r"\b(left|right|leftwards?|rightwards?|left-hand|right-hand|clockwise|counter-?clockwise|anticlockwise"
    r"|east(ern|wards?)?|west(ern|wards?)?)\b",
    re.IGNORECASE,
)


MOST_ASPECT = 100  # a longer picture, scaled to cover a crop, would take gigabytes


def check_shape(height: int, width: int, aspect: float = 1.0) -> None:
    """Refuse pictures that are absurdly long or narrow: scaled to cover a crop, they would take gigabytes.

    Args:
        height, width: pixels.
        aspect: pixel aspect ratio, width over height.

    Raises:
        DataError: the picture's sides, as shown, differ by more than 100 times.
    """
    ratio = width * aspect / height
    if not 1 / MOST_ASPECT <= ratio <= MOST_ASPECT:
        raise DataError(
            f"{width}x{height} pixels of aspect {aspect:g}: one side is over {MOST_ASPECT} times as long as the other"
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """Resizes frames to cover `height` x `width` pixels, keeping the display aspect ratio, then crops and flips them.

    Attributes:
        height, width: target size in pixels.
        x, y: position of the crop, from 0 (left, top) to 1 (right, bottom); 0.5 is the centre.
        flip: mirror left and right.
        aspect: pixel aspect ratio of the source, width over height.
    """

    height: int
    width: int
    x: float = 0.5
    y: float = 0.5
    flip: bool = False
    aspect: float = 1.0

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that a picture of `height` x `width` source pixels is resized to."""
        shown = width * self.aspect
        scale = max(self.height / height, self.width / shown)
        return max(self.height, round(height * scale)), max(self.width, round(shown * scale))

    def __call__(self, picture: Tensor) -> Tensor:
        """Resize (antialiased bicubic, as Pillow does), crop and flip a picture.

        Args:
            picture: [C, H, W], uint8 or float.

        Returns:
            [C, height, width] of the same dtype.
        """
        rows, columns = picture.shape[-2:]
        check_shape(rows, columns, self.aspect)
        height, width = self.scaled(rows, columns)
        if (height, width) != (rows, columns):
            # torch's 8-bit kernel fails on outputs of a single row or column.
            through_float = picture.dtype == torch.uint8 and min(height, width) == 1
            picture = picture.float() if through_float else picture
            # Decoded pictures are channels last already; torch fails on others where a side shrinks to one pixel.
            batch = picture[None].contiguous(memory_format=torch.channels_last)
            picture = F.interpolate(batch, (height, width), mode="bicubic", antialias=True)[0]
            picture = picture.round().clamp(0, 255).to(torch.uint8) if through_float else picture
        top, left = round(self.y * (height - self.height)), round(self.x * (width - self.width))
        picture = picture[:, top : top + self.height, left : left + self.width]
        return picture.flip(-1) if self.flip else picture


def may_flip(caption: str) -> bool:
    """Return whether a mirrored clip still matches its caption, which must not mention left, right and the like."""
    return not SIDES.search(caption)


def normalise(picture: Tensor) -> Tensor:
    """Convert uint8, or float in [0, 1], to float32 in [-1, 1]; any shape."""
    if picture.dtype == torch.uint8:
        # Divided by a tensor on its device: by a number, CUDA would multiply with the rounded reciprocal.
        return picture.to(torch.float32).div_(torch.full((), 127.5, device=picture.device)).sub_(1)
    return picture.clamp(0, 1).mul_(2).sub_(1)


def to_float(video: Tensor) -> Tensor:
    """Convert uint8 pixels, of any shape, to float32 in [-1, 1], to the bit the same on every device.

    Other types are returned as they are: pixels in [-1, 1], or latents.
    """
    return normalise(video) if video.dtype == torch.uint8 else video


def stack_videos(videos: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Stack pictures or videos of equal shape; those of uint8 become float32 in [-1, 1] if others are float32."""
    same = len({video.dtype for video in videos}) == 1
    return torch.stack(list(videos) if same else [to_float(video) for video in videos], dim)


def to_uint8(values: Tensor) -> Tensor:
    """Convert values in [-1, 1], of any shape, to uint8 on the CPU, rounded; values outside are clamped."""
    return values.detach().to("cpu", torch.float32).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
