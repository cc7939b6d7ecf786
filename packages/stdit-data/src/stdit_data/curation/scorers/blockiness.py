"""Measure the edges of a codec's 8x8 blocks, which strong compression leaves."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from stdit_data.curation.sampling import Array, ClipFrames

COLUMNS = {"blockiness": pa.float64()}  # steps at block edges over steps elsewhere; 1 without blocks
BLOCK = 8  # pixels
FLOOR = 0.5  # of 255: keeps flat pictures at 1


def score(clip: ClipFrames) -> dict[str, float | None]:
    """Return the mean step across the 8-pixel grid over that off it, on full-size luma; median of the frames."""
    values = [_ratio(luma) for luma in clip.full if min(luma.shape) >= 4 * BLOCK]
    return {"blockiness": float(np.median(values)) if values else None}


def _ratio(luma: Array) -> float:
    ratios = []
    for picture in (luma, luma.T):
        steps = np.abs(np.diff(picture.astype(np.int16), axis=1)).mean(axis=0)
        edge = np.arange(1, len(steps) + 1) % BLOCK == 0
        ratios.append((steps[edge].mean() + FLOOR) / (steps[~edge].mean() + FLOOR))
    return float(np.mean(ratios))
