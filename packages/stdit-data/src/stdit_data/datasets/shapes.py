"""The procedural data set `shapes`: captioned videos of coloured shapes, drawn on the fly.

Every clip is a function of (split, seed, index), at any frames x height x width: one plain shape on a dark ground, in
one of seven colours, still or moving at constant speed in one of eight directions, wrapping at the edges. Some
colour-shape-motion triples are held out of training, while every pair of the three is seen: they test whether a model
generalises to new combinations.

Legend: C channels, T frames, H W height and width. x grows rightwards, y downwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stdit_data.buckets import Bucket
from stdit_data.clip import Clip
from stdit_data.errors import DataError

Split = Literal["train", "val", "heldout"]

BACKGROUND = (24, 24, 28)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 45, 40),
    "green": (40, 190, 70),
    "blue": (50, 90, 255),
    "yellow": (250, 220, 50),
    "purple": (200, 60, 240),
    "cyan": (40, 215, 225),
    "white": (245, 245, 245),
}

MAX_START = 256  # frames of the longer video before a clip that is cut out of it, at most

_DIAGONAL = math.sqrt(0.5)
MOTIONS: dict[str, tuple[float, float]] = {  # unit vectors
    "still": (0.0, 0.0),
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up left": (-_DIAGONAL, -_DIAGONAL),
    "up right": (_DIAGONAL, -_DIAGONAL),
    "down left": (-_DIAGONAL, _DIAGONAL),
    "down right": (_DIAGONAL, _DIAGONAL),
}

# Signed distances (negative inside) of shapes of "radius" 1 centred at the origin.
_Array = NDArray[np.float64]
_Distance = Callable[[_Array, _Array], _Array]


def _circle(x: _Array, y: _Array) -> _Array:
    distance: _Array = np.hypot(x, y) - 1.0
    return distance


def _triangle(x: _Array, y: _Array) -> _Array:
    """Equilateral, a corner up; the centroid at the origin."""
    distance: _Array = np.maximum(y, np.abs(x) * math.sqrt(0.75) - y * 0.5) - 0.6
    return distance


def _box(x: _Array, y: _Array, half_width: float, half_height: float) -> _Array:
    distance: _Array = np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)
    return distance


def _cross(x: _Array, y: _Array) -> _Array:
    distance: _Array = np.minimum(_box(x, y, 1.1, 0.33), _box(x, y, 0.33, 1.1))
    return distance


def _bar(x: _Array, y: _Array) -> _Array:
    return _box(x, y, 1.2, 0.42)


SHAPES: dict[str, _Distance] = {"circle": _circle, "triangle": _triangle, "cross": _cross, "bar": _bar}

_MOVING = (
    "a {colour} {shape} moving {direction}",
    "a {colour} {shape} moves {direction}",
    "the {colour} {shape} is moving {direction}",
    "{colour} {shape} going {direction}",
    "a {shape} that is {colour} moving {direction}",
    "a video of a {colour} {shape} that moves {direction}",
)
_STILL = (
    "a {colour} {shape} staying still",
    "a {colour} {shape} standing still",
    "a still {colour} {shape}",
    "a {colour} {shape} that does not move",
    "a {shape} that is {colour} staying still",
    "a video of a {colour} {shape} that is not moving",
)


@dataclass(frozen=True)
class Triple:
    """The content of a caption: colour, shape and motion."""

    colour: str
    shape: str
    motion: str

    def captions(self) -> list[str]:
        """Return every wording of the triple, the plainest first."""
        if self.motion == "still":
            return [wording.format(colour=self.colour, shape=self.shape) for wording in _STILL]
        direction = self.motion.replace(" ", " and ")  # "up and left"
        return [wording.format(colour=self.colour, shape=self.shape, direction=direction) for wording in _MOVING]


def _held_out(colour: int, shape: int, motion: int) -> bool:
    """Hold out one motion of every colour-shape pair, with distinct colour-motion and shape-motion pairs."""
    return motion == (2 * shape + colour) % len(MOTIONS)


def triples(split: Split) -> list[Triple]:
    """Return the triples of a split: the same for train and val, and for heldout the other 28."""
    every = itertools.product(enumerate(COLOURS), enumerate(SHAPES), enumerate(MOTIONS))
    return [Triple(c, s, m) for (i, c), (j, s), (k, m) in every if _held_out(i, j, k) == (split == "heldout")]


def vocabulary() -> list[str]:
    """Return every word that occurs in captions, sorted."""
    all_captions = (caption for split in ("train", "heldout") for t in triples(split) for caption in t.captions())
    return sorted({word for caption in all_captions for word in caption.split()})


@dataclass(frozen=True)
class Scene:
    """The parameters that a clip is drawn from."""

    triple: Triple
    caption: str
    x: float  # centre in the first frame, 0..1 of the frame's width
    y: float  # 0..1 of the frame's height
    radius: float  # in units of the frame's shorter side
    speed: float  # in units of the frame's shorter side per frame
    start: int = 0  # frames before the clip in the video that it is cut from


def render(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """Draw a scene, antialiased and wrapping at the edges.

    Args:
        scene: what to draw.
        frames, height, width: size of the video, in frames and pixels.

    Returns:
        [3, T, H, W] float32 in [-1, 1].
    """
    side = min(height, width)
    dx, dy = MOTIONS[scene.triple.motion]
    t = np.arange(frames)
    center_x = scene.x * width + dx * scene.speed * side * t
    center_y = scene.y * height + dy * scene.speed * side * t
    # The shorter distance from the centre around the edges, so that what leaves at one edge enters at the other.
    x = (np.arange(width) + 0.5 - center_x[:, None] + width / 2) % width - width / 2
    y = (np.arange(height) + 0.5 - center_y[:, None] + height / 2) % height - height / 2
    radius = scene.radius * side
    distance = SHAPES[scene.triple.shape](x[:, None, :] / radius, y[:, :, None] / radius) * radius
    return paint(np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32), COLOURS[scene.triple.colour])


def paint(coverage: NDArray[np.float32], colour: tuple[int, int, int]) -> Tensor:
    """Paint a shape in a colour on the dark ground.

    Args:
        coverage: how much of each pixel the shape covers, [T, H, W] in 0..1.
        colour: RGB, 0..255.

    Returns:
        [3, T, H, W] float32 in [-1, 1].
    """
    rgb, ground = (np.asarray(value, np.float32)[:, None, None, None] for value in (colour, BACKGROUND))
    return torch.from_numpy((ground + coverage[None] * (rgb - ground)) / 127.5 - 1.0)


class ShapesDataset:
    """A `ClipDataset` of drawn clips, each determined by (split, seed, index).

    Args:
        frames, height, width: size of every clip, in frames and pixels.
        split: "train"; "val", other clips of the same triples; or "heldout", clips of the held-out triples.
        length: clips per epoch. Larger indices work too.
        seed: seed of the clips.
        fps: frame rate of the clips, in frames per second.
        spread: largest distance of a shape's start from the middle, as a share of the frame; 0.5 is anywhere.
        later: share of the clips that are cut out of a longer video, where the shape may start anywhere.
        single_frames: share of the clips that are a single frame.

    Raises:
        DataError: the split is unknown.
    """

    def __init__(
        self,
        *,
        frames: int = 16,
        height: int = 64,
        width: int = 64,
        split: Split = "train",
        length: int = 8192,
        seed: int = 0,
        fps: float = 8.0,
        spread: float = 0.15,
        later: float = 0.0,
        single_frames: float = 0.0,
    ) -> None:
        if split not in get_args(Split):
            raise DataError(f"unknown split {split!r} of shapes: choose one of {', '.join(get_args(Split))}")
        self.size = Bucket(frames, height, width)
        self.split: Split = split
        self.length = length
        self.seed = seed
        self.fps = fps
        self.spread = spread
        self.later = later
        self.single_frames = single_frames
        self._triples: Sequence[Triple] = triples(split)

    def __len__(self) -> int:
        return self.length

    def bucket(self, index: int) -> Bucket:
        """Return frames, height and width."""
        if not self.single_frames:
            return self.size
        rng = np.random.default_rng([self.seed, get_args(Split).index(self.split), index, 1])
        return self.size._replace(frames=1) if rng.random() < self.single_frames else self.size

    def caption(self, index: int) -> str:
        """Return the clip's caption, without drawing the clip."""
        return self.scene(index).caption

    def path(self, index: int) -> str:
        """Return a name for the clip, in place of a file."""
        return f"shapes:{self.split}/{self.seed}/{index}"

    def settings(self) -> dict[str, Any]:
        """Return what determines every clip."""
        return {
            "split": self.split,
            "length": self.length,
            "seed": self.seed,
            "fps": self.fps,
            "spread": self.spread,
            **({"later": self.later} if self.later else {}),
            **({"single_frames": self.single_frames} if self.single_frames else {}),
            **self.size._asdict(),
        }

    def scene(self, index: int) -> Scene:
        """Draw the parameters of clip `index` at random."""
        rng = np.random.default_rng([self.seed, get_args(Split).index(self.split), index])
        triple = self._triples[int(rng.integers(len(self._triples)))]
        wordings = triple.captions()
        caption = wordings[rng.integers(len(wordings))]
        x, y = 0.5 + rng.uniform(-self.spread, self.spread, size=2)
        radius, speed = rng.uniform(0.17, 0.21), rng.uniform(0.02, 0.03)
        start = 0
        if self.later and rng.random() < self.later:
            (x, y), start = rng.uniform(size=2), int(rng.integers(1, MAX_START))
        return Scene(triple, caption, float(x), float(y), radius, speed, start)

    def load(self, index: int, *, seed: int = 0, epoch: int = 0) -> Clip:
        """Draw clip `index`; `seed` and `epoch` have no effect."""
        scene = self.scene(index)
        size = self.bucket(index)
        video = render(scene, *size)
        span = (scene.start / self.fps, (scene.start + size.frames - 1) / self.fps)
        return Clip(video=video, caption=scene.caption, index=index, fps=self.fps, span=span)
