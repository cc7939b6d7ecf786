"""Measure black bars above and below, or left and right."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from stdit_data.curation.detectors import BLACK, is_black
from stdit_data.curation.sampling import ClipFrames

COLUMNS = {
    "letterbox": pa.float64(),  # share of the picture that bars cover
    "picture_box": pa.list_(pa.float64()),  # left, top, right and bottom of what is within, 0 to 1
}
SPREAD = 4.0  # standard deviation of 255 up to which a dark line is a bar and not a dark scene


def score(clip: ClipFrames) -> dict[str, float | list[float] | None]:
    """Return the bars; a line is part of one if it is dark and plain in every frame that is not black."""
    lit = [grey for grey in clip.grey if not is_black(grey)]
    if not lit:
        return {"letterbox": 0.0, "picture_box": [0.0, 0.0, 1.0, 1.0]}
    pictures = np.stack(lit)
    top, bottom = _inner(pictures.max(axis=0).mean(axis=1), pictures.std(axis=2).max(axis=0))
    left, right = _inner(pictures.max(axis=0).mean(axis=0), pictures.std(axis=1).max(axis=0))
    covered = 1 - (right - left) * (bottom - top)
    return {"letterbox": covered, "picture_box": [left, top, right, bottom]}


def _inner(brightness: np.ndarray, spread: np.ndarray) -> tuple[float, float]:
    """Return where the picture begins and ends, as shares of the side."""
    picture = np.flatnonzero((brightness >= BLACK) | (spread > SPREAD))
    if len(picture) == 0:
        return 0.0, 1.0
    return float(picture[0] / len(brightness)), float((picture[-1] + 1) / len(brightness))
