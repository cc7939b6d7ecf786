"""A look at a dataset: a contact sheet and a wall of a few samples, as training would see them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stdit_data.clip import Clip, ClipDataset
from stdit_data.errors import ClipError, DataError
from stdit_data.sheet import contact_sheet, video_wall


def preview(
    dataset: ClipDataset,
    sheet: str | Path,
    wall: str | Path | None = None,
    *,
    samples: int = 6,
    columns: int = 8,
    seed: int = 0,
    size: int | None = None,
) -> list[ClipError]:
    """Writes a PNG with a row of frames per sample and an mp4 in which the samples play side by side.

    Args:
        dataset: what to show.
        sheet: the PNG.
        wall: the mp4; plays at the highest rate among the samples, each at its own speed.
        samples: how many; drawn by the seed, shown in dataset order.
        columns: frames per row of the sheet.
        size: the longer side of a frame in pixels, see `contact_sheet`.

    Returns:
        What could not be read; another sample is shown instead.

    Raises:
        DataError: no sample can be read.
    """
    if samples < 1:
        raise DataError(f"samples {samples}: expected at least 1")
    clips: list[Clip] = []
    errors: list[ClipError] = []
    for index in np.random.default_rng(seed).permutation(len(dataset)):
        if len(clips) == samples:
            break
        try:
            clips.append(dataset.load(int(index), seed=seed, epoch=0))
        except ClipError as error:
            errors.append(error)
    if not clips:
        raise DataError(f"no clip can be read; the first: {errors[0]}" if errors else "the dataset has no samples")
    clips.sort(key=lambda clip: clip.index)
    videos = [clip.video for clip in clips]
    captions = [f"{clip.index}: {clip.caption or '(no caption)'}" for clip in clips]
    Path(sheet).parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(videos, captions, columns=columns, size=size).save(sheet)
    if wall is not None:
        rate = max((clip.fps for clip in clips), default=0.0) or 8.0
        Path(wall).parent.mkdir(parents=True, exist_ok=True)
        video_wall(wall, [_at_rate(clip, rate) for clip in clips], captions, fps=rate, size=size)
    return errors


def _at_rate(clip: Clip, rate: float) -> Tensor:
    """The clip's video played at `rate`, at its own speed: slower ones show each frame for longer."""
    if not clip.fps or clip.fps == rate:
        return clip.video
    shown = torch.arange(math.ceil(clip.video.shape[1] * rate / clip.fps)) * (clip.fps / rate)
    return clip.video[:, (shown + 1e-6).long().clamp(max=clip.video.shape[1] - 1)]
