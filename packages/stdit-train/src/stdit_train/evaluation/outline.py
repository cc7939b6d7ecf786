"""Measure how well shapes are drawn: overlap with the ideal shape, and steadiness of the outline.

The ideal shape is the one that the prompt names, drawn as `stdit_data.datasets.shapes` draws it, at the centre and size
that fit each frame best. T frames, H W pixels, K directions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from stdit_data.datasets.shapes import BACKGROUND, SHAPES
from stdit_train.evaluation.confidence import Interval, mean_interval
from stdit_train.evaluation.shape_reader import FOREGROUND_DISTANCE, circular_center, unit_area

GOOD = 0.9  # overlap above which the shape of a frame counts as well drawn
DIRECTIONS = 64  # in which the outline's distance from the centre is measured
REACH = 1.5  # how far out it is looked for, in sizes of the shape: the bar's corners are at 1.27
ITERATIONS = 12  # of Gauss-Newton
SMALLEST = 1.0  # radius in pixels that a fit goes down to


@dataclass(frozen=True)
class Outline:
    """Measurements of one video.

    Attributes:
        overlap: intersection over union with the ideal shape, [T], 0..1; 0 for a frame that shows nothing.
        change: how far the outline moves between neighbouring frames, as seen from the shape's centre: root mean square
            over directions and frames, as a share of the shape's size. None if no two neighbouring frames show one.
    """

    overlap: np.ndarray
    change: float | None


class OutlineQuality:
    """Mean overlap, share of well-drawn frames and outline change, each video counting once."""

    def __init__(self) -> None:
        self._overlaps: list[float] = []
        self._good: list[float] = []
        self._changes: list[float] = []

    def add(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> None:
        """Measure videos [3, T, H, W] in [-1, 1]; those whose prompt names no shape are left out."""
        for video, prompt in zip(videos, prompts, strict=True):
            named = [word for word in prompt.lower().split() if word in SHAPES]
            if named:
                found = measure_outline(video, named[0])
                self._overlaps.append(float(found.overlap.mean()))
                self._good.append(float((found.overlap > GOOD).mean()))
                if found.change is not None:
                    self._changes.append(found.change)

    def result(self) -> dict[str, Interval]:
        """Return the means over the videos, with 95 % intervals."""
        values = {
            "shape IoU": self._overlaps,
            f"frames with IoU > {GOOD:g}": self._good,
            "outline change": self._changes,
        }
        return {name: mean_interval(numbers) for name, numbers in values.items() if numbers}


def measure_outline(video: Tensor, shape: str) -> Outline:
    """Compare a clip [3, T, H, W] in [-1, 1] with a shape of `SHAPES`."""
    coverage_THW = shape_coverage(video)
    shown_T = coverage_THW.sum((1, 2)) > math.pi * SMALLEST**2
    overlap_T = np.zeros(len(coverage_THW))
    if not shown_T.any():
        return Outline(overlap_T, None)
    fit_T3 = np.zeros((len(coverage_THW), 3))
    fit_T3[shown_T] = fit_shape(coverage_THW[shown_T], shape)
    ideal_THW = draw(fit_T3[shown_T], shape, *coverage_THW.shape[1:])
    shared_T = np.minimum(coverage_THW[shown_T], ideal_THW).sum((1, 2))
    overlap_T[shown_T] = shared_T / np.maximum(coverage_THW[shown_T], ideal_THW).sum((1, 2))
    both_T = shown_T[1:] & shown_T[:-1]
    if not both_T.any():
        return Outline(overlap_T, None)
    size = float(np.median(fit_T3[shown_T, 2]))
    step_TK = np.diff(outline_distances(coverage_THW, fit_T3[:, :2], REACH * size), axis=0)[both_T]
    return Outline(overlap_T, float(np.sqrt((step_TK**2).mean()) / size))


def shape_coverage(video: Tensor) -> np.ndarray:
    """Return how much of each pixel the shape covers, [T, H, W] in 0..1.

    A pixel's coverage is where its colour lies between the background's and the shape's. The shape's colour is the
    median of the foreground, so that a wrong colour does not count here.
    """
    pixels_THWC = (video.float().permute(1, 2, 3, 0).cpu().numpy() + 1.0) * 127.5 - np.asarray(BACKGROUND, np.float32)
    foreground = pixels_THWC[np.linalg.norm(pixels_THWC, axis=-1) > FOREGROUND_DISTANCE]
    if not len(foreground):
        return np.zeros(pixels_THWC.shape[:3])
    colour = np.median(foreground, axis=0).astype(np.float64)
    return np.clip(pixels_THWC @ colour / (colour @ colour), 0.0, 1.0)


def draw(fit_T3: np.ndarray, shape: str, height: int, width: int) -> np.ndarray:
    """Return the coverage [T, H, W] of a shape at (x, y, radius) in pixels, as `shapes.render` draws it."""
    x, y = offsets(fit_T3[:, :2], height, width)
    radius = fit_T3[:, 2, None, None]
    return np.clip(0.5 - SHAPES[shape](x[:, None, :] / radius, y[:, :, None] / radius) * radius, 0.0, 1.0)


def offsets(center_T2: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets of columns [T, W] and rows [T, H] from a centre, in pixels, around a frame that wraps."""
    x = (np.arange(width) + 0.5 - center_T2[:, :1] + width / 2) % width - width / 2
    y = (np.arange(height) + 0.5 - center_T2[:, 1:] + height / 2) % height - height / 2
    return x, y


def fit_shape(coverage_THW: np.ndarray, shape: str) -> np.ndarray:
    """Fit centre and radius (x, y, radius), in pixels, to each frame by least squares: [T, 3].

    Gauss-Newton with finite differences, from the centroid and the area; steps that do not reduce the error are halved.
    """
    height, width = coverage_THW.shape[1:]
    radius_T = np.sqrt(coverage_THW.sum((1, 2)) / unit_area(shape))
    center_T2 = np.stack([circular_center(frame) for frame in coverage_THW])
    fit_T3 = np.concatenate([center_T2, radius_T[:, None]], axis=1)

    def error(fit: np.ndarray) -> np.ndarray:
        return ((draw(fit, shape, height, width) - coverage_THW) ** 2).sum((1, 2))

    error_T, damping_T = error(fit_T3), np.ones(len(fit_T3))
    for _ in range(ITERATIONS):
        delta = 0.05
        rest_TP = (coverage_THW - draw(fit_T3, shape, height, width)).reshape(len(fit_T3), -1)
        slope_T3P = np.stack(
            [
                (draw(fit_T3 + step, shape, height, width) - draw(fit_T3 - step, shape, height, width)) / (2 * delta)
                for step in delta * np.eye(3)
            ],
            axis=1,
        ).reshape(len(fit_T3), 3, -1)
        normal_T33 = slope_T3P @ slope_T3P.transpose(0, 2, 1) + 1e-3 * np.eye(3)
        step_T3 = np.linalg.solve(normal_T33, (slope_T3P @ rest_TP[:, :, None]))[..., 0].clip(-2.0, 2.0)
        tried_T3 = fit_T3 + damping_T[:, None] * step_T3
        tried_T3[:, 2] = np.maximum(tried_T3[:, 2], SMALLEST)
        tried_T = error(tried_T3)
        better_T = tried_T < error_T
        fit_T3 = np.where(better_T[:, None], tried_T3, fit_T3)
        error_T = np.where(better_T, tried_T, error_T)
        damping_T = np.where(better_T, np.minimum(1.0, 2 * damping_T), damping_T / 2)
    return fit_T3


def outline_distances(coverage_THW: np.ndarray, center_T2: np.ndarray, reach: float) -> np.ndarray:
    """Return the distance in pixels of the outline from the centre in each direction, [T, K].

    The integral of the coverage along the ray, up to `reach` pixels: sharp to a fraction of a pixel for any shape
    without holes of which the centre sees every point, as those of `SHAPES` are.
    """
    frames, height, width = coverage_THW.shape
    angle_K = 2 * np.pi * (np.arange(DIRECTIONS) + 0.5) / DIRECTIONS
    count = math.ceil(4 * reach)
    along_R = (np.arange(count) + 0.5) * reach / count
    x = center_T2[:, 0, None, None] + np.cos(angle_K)[:, None] * along_R - 0.5
    y = center_T2[:, 1, None, None] + np.sin(angle_K)[:, None] * along_R - 0.5
    left, top = np.floor(x), np.floor(y)
    right_part, lower_part = x - left, y - top
    frame = np.arange(frames)[:, None, None]

    def at(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        return coverage_THW[frame, row.astype(int) % height, column.astype(int) % width]

    upper = at(top, left) * (1 - right_part) + at(top, left + 1) * right_part
    lower = at(top + 1, left) * (1 - right_part) + at(top + 1, left + 1) * right_part
    return (upper * (1 - lower_part) + lower * lower_part).sum(-1) * reach / count
