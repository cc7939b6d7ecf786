"""Measure how much of the picture text covers: subtitles, captions, credits."""

from __future__ import annotations

import logging
from typing import Any

import cv2
import numpy as np

from stdit_data.curation.sampling import ClipFrames
from stdit_data.errors import DataError

FRAMES = 3  # looked at: detecting text takes longer than all other scores
LONGER_SIDE = 384  # pixels that the detector works at


class TextArea:
    """RapidOCR's text detector, whose model comes with its package.

    Raises:
        DataError: RapidOCR is not installed.
    """

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError:
            raise DataError("RapidOCR is not installed; install stdit-data[ocr]") from None
        logging.getLogger("RapidOCR").setLevel(logging.ERROR)
        self.engine: Any = RapidOCR(
            params={
                "Global.log_level": "error",
                "Det.limit_type": "max",
                "Det.limit_side_len": LONGER_SIDE,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            }
        )

    def __call__(self, clip: ClipFrames) -> dict[str, float]:
        """Return the mean share over a few evenly spaced frames."""
        places = np.linspace(0, len(clip.rgb) - 1, min(FRAMES, len(clip.rgb))).round().astype(int)
        return {"text_area": float(np.mean([self._share(clip.rgb[place]) for place in places]))}

    def _share(self, rgb: np.ndarray) -> float:
        found = self.engine(np.ascontiguousarray(rgb[..., ::-1]), use_det=True, use_cls=False, use_rec=False)
        covered = np.zeros(rgb.shape[:2], np.uint8)
        for box in () if found.boxes is None else found.boxes:
            cv2.fillPoly(covered, [np.asarray(box).round().astype(np.int32)], 1)
        return float(covered.mean())
