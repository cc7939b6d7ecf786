"""Measure camera motion: the part of the optical flow that the whole picture shares."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from stdit_data.curation.sampling import Array, ClipFrames

COLUMNS = {
    "pan_x": pa.float64(),  # pixels a pair at 256 pixels; above 0 the camera turns right
    "pan_y": pa.float64(),  # above 0 it turns down
    "zoom": pa.float64(),  # change of size a pair; 0.01 is 1 % closer
}


def score(clip: ClipFrames) -> dict[str, float | None]:
    """Return the median over the picture, averaged over frame pairs, so that motion within the scene hardly counts."""
    if len(clip.grey) < 2:
        return dict.fromkeys(COLUMNS)
    pans = np.array([np.median(flow, axis=(0, 1)) for flow in clip.flow])
    zooms = [_zoom(flow - pan) for flow, pan in zip(clip.flow, pans, strict=True)]
    # The scene goes left where the camera turns right.
    return {"pan_x": -float(pans[:, 0].mean()), "pan_y": -float(pans[:, 1].mean()), "zoom": float(np.mean(zooms))}


def _zoom(flow: Array) -> float:
    """Return the median growth of the distance to the centre, over the pixels away from it."""
    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    squared = x**2 + y**2
    outer = squared > (min(height, width) / 4) ** 2
    return float(np.median((flow[..., 0] * x + flow[..., 1] * y)[outer] / squared[outer]))
