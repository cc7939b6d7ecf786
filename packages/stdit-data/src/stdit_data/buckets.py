"""Buckets: the shapes (frames x height x width) that a run trains on. A global batch comes from one bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from stdit_data.errors import DataError


class Bucket(NamedTuple):
    """The shape of a clip in frames and pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    def tokens(self, stride: tuple[int, int, int] = (1, 16, 16)) -> int:
        """Return the number of tokens of one clip in the model.

        Args:
            stride: frames and pixels per token along time, height and width. The default is Open-Sora 1.0's: an 8x VAE
                and patches of 1 x 2 x 2.
        """
        return math.prod(math.ceil(n / s) for n, s in zip(self, stride, strict=True))


def parse_bucket(text: str) -> Bucket:
    """Parse FRAMESxHEIGHTxWIDTH, as in `16x256x256`.

    Raises:
        DataError: the text is not three positive whole numbers.
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise DataError(f"bucket {text!r}: expected FRAMESxHEIGHTxWIDTH, three positive whole numbers as in 16x256x256")
    return Bucket(*(int(part) for part in parts))


def choose_bucket(buckets: Sequence[Bucket], frames: int, height: int, width: int) -> Bucket:
    """Choose the bucket of a clip.

    By length first: the longest buckets that the clip fills, or the shortest if it fills none. Among those the nearest
    aspect ratio (on a log scale, so 2:1 and 1:2 are equally far from 1:1); among equals the largest that needs no
    upscaling, else the smallest.

    Args:
        buckets: buckets to choose from.
        frames: number of usable frames of the clip.
        height, width: size of the clip in pixels.

    Raises:
        DataError: there are no buckets.
    """
    if not buckets:
        raise DataError("buckets: expected at least one, as in 16x256x256")
    fitting = [bucket.frames for bucket in buckets if bucket.frames <= frames]
    length = max(fitting) if fitting else min(bucket.frames for bucket in buckets)
    aspect = math.log(width / height)

    def rank(bucket: Bucket) -> tuple[float, bool, int]:
        distance = round(abs(math.log(bucket.width / bucket.height) - aspect), 6)
        enlarged = bucket.height > height or bucket.width > width
        area = bucket.height * bucket.width
        return distance, enlarged, area if enlarged else -area

    return min((bucket for bucket in buckets if bucket.frames == length), key=rank)


def batch_sizes(
    buckets: Sequence[Bucket], tokens: int, *, multiple_of: int = 1, stride: tuple[int, int, int] = (1, 16, 16)
) -> dict[Bucket, int]:
    """Compute each bucket's batch size from a token budget.

    Args:
        buckets: the buckets.
        tokens: most tokens in a batch.
        multiple_of: round down to a multiple of this (for a global batch, the number of ranks).
        stride: frames and pixels per token, see `Bucket.tokens`.

    Raises:
        DataError: the budget is too small for `multiple_of` clips of a bucket.
    """
    sizes = {bucket: tokens // bucket.tokens(stride) // multiple_of * multiple_of for bucket in buckets}
    for bucket, size in sizes.items():
        if size < 1:
            need = bucket.tokens(stride) * multiple_of
            clips = "a clip" if multiple_of == 1 else f"{multiple_of} clips"
            raise DataError(
                f"token budget {tokens}: bucket {bucket} needs {need} tokens for {clips}; raise the budget or remove "
                "the bucket"
            )
    return sizes
