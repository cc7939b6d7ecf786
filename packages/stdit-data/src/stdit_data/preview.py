"""A look at a dataset: a contact sheet and a wall of a few samples, as training would see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stdit_data.clip import Clip, ClipDataset
from stdit_data.errors import ClipError, DataError
from stdit_data.transforms import normalise, to_uint8
from stdit_data.video.write import write_mp4


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


PAPER, INK = (255, 255, 255), (32, 32, 32)


GAP = 4  # pixels between cells


LEAST_SIDE = 96  # smaller videos are enlarged to at least this


FONT_SIZE = 13


def contact_sheet(
    videos: Sequence[Tensor], captions: Sequence[str], *, columns: int = 8, size: int | None = None
) -> Image.Image:
    """A row a video: `columns` evenly spaced frames, first and last included, under the caption.

    Args:
        videos: each [C, T, H, W] in [-1, 1]; sizes and lengths may differ. A video shorter than `columns` shows every
            frame it has once.
        captions: one per video; long ones are wrapped.
        columns: frames shown per video.
        size: the longer side of a frame on the sheet in pixels. Without it frames keep their size, but those below
            96 pixels are enlarged by a whole factor (nearest neighbour, so that single pixels stay visible).

    Returns:
        An RGB image.
    """
    _check(videos, captions)
    if columns < 1:
        raise DataError(f"columns {columns}: expected at least 1")
    rows = []
    for video in videos:
        count = min(columns, video.shape[1])
        steps = torch.linspace(0, video.shape[1] - 1, count).round().long()
        rows.append([_scaled(frame, size) for frame in _frames(video[:, steps])])
    width = max(_row_width(row) for row in rows)
    labels = [_label(caption, width) for caption in captions]
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
    """Writes an mp4 in which the videos play side by side under their captions.

    Args:
        path: the file to write.
        videos: each [C, T, H, W] in [-1, 1]. Shorter ones hold their last frame until the longest ends.
        captions: one per video.
        fps: frames a second.
        columns: videos per row; about square without it.
        size: as in `contact_sheet`.
    """
    _check(videos, captions)
    columns = columns or math.ceil(math.sqrt(len(videos)))
    length = max(video.shape[1] for video in videos)
    cells = [[_scaled(frame, size) for frame in _frames(video)] for video in videos]
    cell_width = max(frames[0].width for frames in cells) + 2 * GAP
    labels = [_label(caption, cell_width) for caption in captions]
    cell_height = max(frames[0].height for frames in cells) + max(label.height for label in labels) + GAP
    rows = math.ceil(len(videos) / columns)
    wall = Image.new("RGB", (min(columns, len(videos)) * cell_width, rows * cell_height), PAPER)
    corners = [(i % columns * cell_width, i // columns * cell_height) for i in range(len(videos))]
    for (x, y), label in zip(corners, labels, strict=True):
        wall.paste(label, (x, y))
    pictures = []
    for t in range(length):
        for (x, y), label, frames in zip(corners, labels, cells, strict=True):
            wall.paste(frames[min(t, len(frames) - 1)], (x + GAP, y + label.height))
        pictures.append(np.array(wall))
    pixels = torch.from_numpy(np.stack(pictures))
    write_mp4(path, normalise(rearrange(pixels, "t h w c -> c t h w")), fps)


def _check(videos: Sequence[Tensor], captions: Sequence[str]) -> None:
    if not videos or len(videos) != len(captions):
        raise DataError(f"{len(videos)} videos and {len(captions)} captions: expected one caption a video, one or more")


def _frames(video: Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in rearrange(to_uint8(video), "c t h w -> t h w c").numpy()]


def _scaled(frame: Image.Image, size: int | None) -> Image.Image:
    longest = max(frame.size)
    if size is not None:
        target = (max(1, round(frame.width * size / longest)), max(1, round(frame.height * size / longest)))
        smooth = size % longest != 0  # a whole factor keeps pixels as squares
        return frame.resize(target, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)
    factor = math.ceil(LEAST_SIDE / longest)
    if factor == 1:
        return frame
    return frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)


def _row_width(row: list[Image.Image]) -> int:
    return GAP + sum(frame.width + GAP for frame in row)


def _label(text: str, width: int) -> Image.Image:
    """The text wrapped to `width` pixels, dark on white."""
    font = ImageFont.load_default(FONT_SIZE)
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width - 2 * GAP and len(word) > 1:  # one word wider than the sheet: break it
            cut = len(word)
            while cut > 1 and font.getlength(word[:cut]) > width - 2 * GAP:
                cut -= 1
            lines += [line] if line else []
            lines.append(word[:cut])
            line, word = "", word[cut:]
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width - 2 * GAP:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    pitch = FONT_SIZE + 3
    label = Image.new("RGB", (width, pitch * len(lines) + GAP), PAPER)
    draw = ImageDraw.Draw(label)
    for i, text_line in enumerate(lines):
        draw.text((GAP, GAP // 2 + i * pitch), text_line, fill=INK, font=font)
    return label
