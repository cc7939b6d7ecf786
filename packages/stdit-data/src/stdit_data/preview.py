"""Preview videos and data sets: contact sheets, and walls of videos playing side by side.

C channels (3), T frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from stdit_data.clip import Clip, ClipDataset
from stdit_data.errors import ClipError, DataError
from stdit_data.labels import PAPER, draw_label, warn_of_missing
from stdit_data.storage.atomic import open_write
from stdit_data.storage.files import wrap_errors
from stdit_data.transforms import normalise, to_uint8
from stdit_data.video.write import write_mp4

GAP = 4  # pixels between cells
MIN_SIDE = 96  # smaller videos are enlarged to at least this many pixels
MIN_SINGLE = 192  # and single pictures to this many, so that a line of text fits below each


def preview(
    dataset: ClipDataset,
    sheet: str | Path,
    wall: str | Path | None = None,
    *,
    samples: int = 6,
    columns: int = 8,
    seed: int = 0,
    size: int | None = None,
    details: Callable[[int], str] | None = None,
) -> list[ClipError]:
    """Write a PNG with a row of frames per sample, and an mp4 in which the samples play side by side.

    Args:
        dataset: the data set to preview.
        sheet: the PNG to write.
        wall: the mp4 to write; it plays at the highest frame rate among the samples, each at its own speed.
        samples: number of samples, drawn by the seed and shown in the order of the data set.
        columns: frames per row of the sheet.
        seed: seed of the choice of samples and of their randomness.
        size: longer side of a frame in pixels, see `contact_sheet`.
        details: gives a sample's second line on the sheet, by its index.

    Returns:
        The errors of samples that could not be read; others are shown in their place.

    Raises:
        DataError: no sample can be read, a number is out of range, or a file can't be written.
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
        raise DataError(f"no clip can be read; the first: {errors[0]}" if errors else "the data set has no samples")
    clips.sort(key=lambda clip: clip.index)
    videos = [clip.video for clip in clips]
    captions = [f"{clip.index}: {clip.caption or '(no caption)'}" for clip in clips]
    with open_write(str(sheet)) as file:
        told = None if details is None else [details(clip.index) for clip in clips]
        contact_sheet(videos, captions, details=told, columns=columns, size=size).save(file, "PNG")
    if wall is not None:
        rate = max((clip.fps for clip in clips), default=0.0) or 8.0
        with wrap_errors(str(wall)):
            Path(wall).parent.mkdir(parents=True, exist_ok=True)
        video_wall(wall, [_at_rate(clip, rate) for clip in clips], captions, fps=rate, size=size)
    return errors


def contact_sheet(
    videos: Sequence[Tensor],
    captions: Sequence[str],
    *,
    details: Sequence[str] | None = None,
    columns: int = 8,
    size: int | None = None,
) -> Image.Image:
    """Draw one row per video: its caption, and `columns` evenly spaced frames including the first and last.

    Videos of a single frame are drawn as a grid instead, about as many in a row as there are rows.

    A warning is logged where captions have characters that no installed font has; they are drawn as squares.

    Args:
        videos: [3, T, H, W] in [-1, 1] each; sizes and lengths may differ. A video of fewer frames than `columns` shows
            each of them once.
        captions: one per video; long ones are wrapped.
        details: a second text per video, drawn smaller below its caption, for instance seed and file.
        columns: frames shown per video; most pictures in a row of the grid.
        size: longer side of a frame on the sheet, in pixels. By default frames keep their size, but those below 96
            pixels (192 in a grid) are enlarged by a whole factor (nearest neighbour, so that single pixels stay
            visible).

    Returns:
        An RGB image.

    Raises:
        DataError: there are no videos, not one caption (and details) per video, or `columns` is below 1.
    """
    details = details if details is not None else [""] * len(videos)
    _check(videos, captions, details)
    if columns < 1:
        raise DataError(f"columns {columns}: expected at least 1")
    warn_of_missing([*captions, *details])
    if all(video.shape[1] == 1 for video in videos):
        cells = [_scaled(_frames(video)[0], size, MIN_SINGLE) for video in videos]
        across = min(columns, math.ceil(math.sqrt(len(videos))))
        sheet, corners = _grid([cell.size for cell in cells], captions, details, across)
        for cell, corner in zip(cells, corners, strict=True):
            sheet.paste(cell, corner)
        return sheet
    rows = []
    for video in videos:
        count = min(columns, video.shape[1])
        steps = torch.linspace(0, video.shape[1] - 1, count).round().long()
        rows.append([_scaled(frame, size) for frame in _frames(video[:, steps])])
    width = max(GAP + sum(frame.width + GAP for frame in row) for row in rows)
    labels = [draw_label(caption, width, detail) for caption, detail in zip(captions, details, strict=True)]
    height = sum(label.height + row[0].height + 2 * GAP for label, row in zip(labels, rows, strict=True))
    sheet = Image.new("RGB", (width, height), PAPER)
    y = 0
    for label, row in zip(labels, rows, strict=True):
        sheet.paste(label, (0, y))
        y += label.height
        for i, frame in enumerate(row):
            sheet.paste(frame, (GAP + i * (frame.width + GAP), y))
        y += row[0].height + 2 * GAP
    return sheet


def video_wall(
    path: str | Path,
    videos: Sequence[Tensor],
    captions: Sequence[str],
    *,
    fps: float,
    columns: int | None = None,
    size: int | None = None,
) -> None:
    """Write an mp4 in which the videos play side by side under their captions.

    Args:
        path: the file to write; its folder must exist.
        videos: [3, T, H, W] in [-1, 1] each; shorter ones hold their last frame until the longest ends.
        captions: one per video.
        fps: frames per second.
        columns: videos per row; by default about as many as rows.
        size: as in `contact_sheet`.

    Raises:
        DataError: there are no videos, not one caption per video, or the file can't be written.
    """
    _check(videos, captions)
    warn_of_missing(captions)
    columns = columns or math.ceil(math.sqrt(len(videos)))
    length = max(video.shape[1] for video in videos)
    cells = [[_scaled(frame, size) for frame in _frames(video)] for video in videos]
    wall, corners = _grid([frames[0].size for frames in cells], captions, [""] * len(videos), columns)
    pictures = []
    for t in range(length):
        for corner, frames in zip(corners, cells, strict=True):
            wall.paste(frames[min(t, len(frames) - 1)], corner)
        pictures.append(np.array(wall))
    pixels = torch.from_numpy(np.stack(pictures))
    write_mp4(path, normalise(rearrange(pixels, "t h w c -> c t h w")), fps)


def _grid(
    sizes: Sequence[tuple[int, int]], captions: Sequence[str], details: Sequence[str], columns: int
) -> tuple[Image.Image, list[tuple[int, int]]]:
    """Draw the labels of a grid of equal cells; also returns the corners at which the pictures (width, height) go."""
    width = max(width for width, _ in sizes) + 2 * GAP
    labels = [draw_label(caption, width, detail) for caption, detail in zip(captions, details, strict=True)]
    above = max(label.height for label in labels)
    height = above + max(height for _, height in sizes) + GAP
    columns = min(columns, len(labels))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(labels) / columns) * height), PAPER)
    corners = []
    for i, label in enumerate(labels):
        x, y = i % columns * width, i // columns * height
        sheet.paste(label, (x, y))
        corners.append((x + GAP, y + above))
    return sheet, corners


def _at_rate(clip: Clip, rate: float) -> Tensor:
    """Resample a clip's video to `rate` frames per second by repeating frames, keeping its speed."""
    if not clip.fps or clip.fps == rate:
        return clip.video
    shown = torch.arange(math.ceil(clip.video.shape[1] * rate / clip.fps)) * (clip.fps / rate)
    return clip.video[:, (shown + 1e-6).long().clamp(max=clip.video.shape[1] - 1)]


def _check(videos: Sequence[Tensor], captions: Sequence[str], details: Sequence[str] | None = None) -> None:
    if not videos or len(videos) != len(captions):
        raise DataError(f"{len(videos)} videos and {len(captions)} captions: expected one caption per video")
    if details is not None and len(videos) != len(details):
        raise DataError(f"{len(videos)} videos and {len(details)} details: expected one text per video")


def _frames(video: Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in rearrange(to_uint8(video), "c t h w -> t h w c").numpy()]


def _scaled(frame: Image.Image, size: int | None, least: int = MIN_SIDE) -> Image.Image:
    longest = max(frame.size)
    if size is not None:
        target = (max(1, round(frame.width * size / longest)), max(1, round(frame.height * size / longest)))
        smooth = size % longest != 0  # a whole factor keeps pixels square
        return frame.resize(target, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)
    factor = math.ceil(least / longest)
    if factor == 1:
        return frame
    return frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)
