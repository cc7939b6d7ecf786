"""Measure how much moves."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from stdit_data.curation.sampling import ClipFrames

COLUMNS = {
    "motion": pa.float64(),  # pixels a pair at 256 pixels: mean length of the optical flow
    "motion_min": pa.float64(),  # of the weakest pair
    "frozen_share": pa.float64(),  # of the pairs: the picture stays as it is
}
SAME = 1.0  # of 255: mean difference up to which two frames are the same; a key frame alone makes some of it


def score(clip: ClipFrames) -> dict[str, float | None]:
    """Return the mean length of the flow over the picture; None for a single frame."""
    if len(clip.grey) < 2:
        return dict.fromkeys(COLUMNS)
    lengths = [float(np.linalg.norm(flow, axis=2).mean()) for flow in clip.flow]
    changes = np.abs(np.diff(clip.grey.astype(np.int16), axis=0)).mean(axis=(1, 2))
    return {
        "motion": float(np.mean(lengths)),
        "motion_min": min(lengths),
        "frozen_share": float((changes < SAME).mean()),
    }
