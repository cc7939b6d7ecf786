"""Read colour, shape and motion from a video of `shapes`, by image analysis without a network.

T frames, H W pixels. Lengths are in units of the frame's shorter side, as in `stdit_data.datasets.shapes`.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from stdit_data.datasets.shapes import BACKGROUND, COLOURS, MOTIONS, SHAPES, Triple

FOREGROUND_DISTANCE = 80.0  # RGB distance from the ground that makes a pixel foreground; the palette is at 150 or more
COLOUR_DISTANCE = 90.0  # a median foreground colour further than this from every palette colour is none of them
AREA = (0.015, 0.3)  # share of the frame that a shape can cover
PRESENT = 0.75  # share of frames that must show a shape, and share of steps that must agree with the mean velocity
MINIMUM_OVERLAP = 0.7  # mean intersection over union with the best template, below which a shape is none of them
STILL = 0.01  # mean speed per frame below which a shape keeps still; moving ones have 0.02 or more
STEADY = 0.016  # a step further than this from the mean velocity is a jump


@dataclass(frozen=True)
class Reading:
    """What a video shows; None for what cannot be recognised."""

    colour: str | None
    shape: str | None
    motion: str | None
    frames: int

    def matches(self, triple: Triple) -> dict[str, bool]:
        """Compare with a triple: colour, shape, motion, and these together; a single frame has no motion to compare."""
        right = {"colour": self.colour == triple.colour, "shape": self.shape == triple.shape}
        if self.frames > 1:
            right["motion"] = self.motion == triple.motion
        return {"all": all(right.values()), **right}


def analyse(video: Tensor) -> Reading:
    """Read a clip [3, T, H, W] in [-1, 1]."""
    pixels_THWC = (video.float().permute(1, 2, 3, 0).cpu().numpy() + 1.0) * 127.5
    mask_THW = np.linalg.norm(pixels_THWC - np.asarray(BACKGROUND), axis=-1) > FOREGROUND_DISTANCE
    area_T = mask_THW.mean((1, 2))
    present_T = (area_T > AREA[0]) & (area_T < AREA[1])
    if present_T.mean() < PRESENT:
        return Reading(None, None, None, len(mask_THW))
    center_T2 = np.stack([circular_center(mask) for mask in mask_THW])
    return Reading(
        colour=_colour(pixels_THWC[mask_THW]),
        shape=_shape(mask_THW[present_T], center_T2[present_T]),
        motion=_motion(center_T2, present_T, mask_THW.shape[1:]),
        frames=len(mask_THW),
    )


def _colour(pixels_N3: np.ndarray) -> str | None:
    median = np.median(pixels_N3, axis=0)
    distance = {name: float(np.linalg.norm(median - np.asarray(rgb))) for name, rgb in COLOURS.items()}
    nearest = min(distance, key=distance.__getitem__)
    return nearest if distance[nearest] < COLOUR_DISTANCE else None


def circular_center(mask_HW: np.ndarray) -> np.ndarray:
    """Return the centroid (x, y) in pixels of a frame that wraps at its edges: the circular mean."""
    center = []
    for axis in (0, 1):  # summing over rows leaves x, over columns y
        weight = mask_HW.sum(axis)
        angle = 2 * np.pi * (np.arange(len(weight)) + 0.5) / len(weight)
        mean = np.arctan2((weight * np.sin(angle)).sum(), (weight * np.cos(angle)).sum())
        center.append(mean / (2 * np.pi) * len(weight) % len(weight))
    return np.asarray(center)


def _motion(center_T2: np.ndarray, present_T: np.ndarray, size: tuple[int, ...]) -> str | None:
    """Return the nearest of the nine motions, if the velocity is constant."""
    height, width = size
    if len(center_T2) < 2:
        return None
    extent = np.asarray([width, height])
    step = (np.diff(center_T2, axis=0) + extent / 2) % extent - extent / 2
    step = step[present_T[1:] & present_T[:-1]] / min(height, width)
    if not len(step):
        return None
    velocity = np.median(step, axis=0)
    if (np.linalg.norm(step - velocity, axis=1) < STEADY).mean() < PRESENT:
        return None
    speed = np.linalg.norm(velocity)
    if speed < STILL:
        return "still"
    directions = {name: np.dot(velocity, unit) / speed for name, unit in MOTIONS.items() if name != "still"}
    return max(directions, key=directions.__getitem__)


def _shape(mask_PHW: np.ndarray, center_P2: np.ndarray) -> str | None:
    """Return the shape that overlaps best on average, drawn with the area and at the place of the foreground."""
    overlap = {
        name: float(np.mean([_overlap(mask, center, name) for mask, center in zip(mask_PHW, center_P2, strict=True)]))
        for name in SHAPES
    }
    best = max(overlap, key=overlap.__getitem__)
    return best if overlap[best] >= MINIMUM_OVERLAP else None


def _overlap(mask_HW: np.ndarray, center: np.ndarray, shape: str) -> float:
    """Return the intersection over union of the foreground and a shape of the same area at its centre."""
    height, width = mask_HW.shape
    radius = np.sqrt(mask_HW.sum() / unit_area(shape))
    x = (np.arange(width) + 0.5 - center[0] + width / 2) % width - width / 2
    y = (np.arange(height) + 0.5 - center[1] + height / 2) % height - height / 2
    template = SHAPES[shape](x[None] / radius, y[:, None] / radius) < 0
    return float((mask_HW & template).sum() / max((mask_HW | template).sum(), 1))


@lru_cache
def unit_area(shape: str) -> float:
    """Return the area of a shape of radius 1, measured on a fine grid."""
    axis = np.linspace(-1.5, 1.5, 1201)
    return float((SHAPES[shape](axis[None], axis[:, None]) < 0).mean() * 9.0)
