"""Measure sharpness."""

from __future__ import annotations

import cv2
import numpy as np
import pyarrow as pa

from stdit_data.curation.sampling import ClipFrames

COLUMNS = {"sharpness": pa.float64()}  # variance of the Laplacian of the luma, median of the frames


def score(clip: ClipFrames) -> dict[str, float | None]:
    """Return the variance of the Laplacian (Pech-Pacheco et al., 2000), on frames of one size, to be comparable."""
    return {"sharpness": float(np.median([cv2.Laplacian(grey, cv2.CV_64F).var() for grey in clip.grey]))}
