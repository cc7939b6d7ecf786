"""Record length, rate and size of a clip."""

from __future__ import annotations

import pyarrow as pa

from stdit_data.curation.sampling import ClipFrames

COLUMNS = {
    "duration": pa.float64(),  # seconds of the clip; 0 for an image
    "fps": pa.float64(),
    "width": pa.int64(),
    "height": pa.int64(),
    "num_frames": pa.int64(),
    "short_side": pa.int64(),  # the smaller of width and height, in pixels
    "aspect": pa.float64(),  # width over height
}


def score(clip: ClipFrames) -> dict[str, float | None]:
    """Return the values that the file declares."""
    return {
        "duration": clip.seconds,
        "fps": clip.fps or None,
        "width": clip.width,
        "height": clip.height,
        "num_frames": clip.num_frames,
        "short_side": min(clip.width, clip.height),
        "aspect": clip.width / clip.height,
    }
