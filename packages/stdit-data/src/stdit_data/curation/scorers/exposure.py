"""Measure brightness, black frames and flicker."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from stdit_data.curation.detectors import is_black
from stdit_data.curation.sampling import ClipFrames

COLUMNS = {
    "brightness": pa.float64(),  # mean luma, 0 to 1
    "contrast": pa.float64(),  # standard deviation of the luma, 0 to 0.5
    "black_share": pa.float64(),  # of the frames
    "flicker": pa.float64(),  # mean change of direction of the brightness, 0 to 1
}


def score(clip: ClipFrames) -> dict[str, float | None]:
    """Return the scores; flicker is the second difference of the mean luma, which is zero for a fade or a slow pan."""
    means = clip.grey.mean(axis=(1, 2)) / 255
    return {
        "brightness": float(means.mean()),
        "contrast": float(clip.grey.std(axis=(1, 2)).mean() / 255),
        "black_share": float(np.mean([is_black(grey) for grey in clip.grey])),
        "flicker": float(np.abs(np.diff(means, 2)).mean() / 2) if len(means) > 2 else None,
    }
