"""Keep one field of interlaced frames, which hold two instants in alternating lines.

Read as they are, moving edges show combing, which a model would learn to draw. Interpolating the missing lines needs
neighbouring frames; a single field is one instant at half the vertical resolution and the same frame rate.
"""

from __future__ import annotations

from typing import Any

from stdit_data.video.filters import FrameFilter


def is_interlaced(frame: Any, codec: str) -> bool:
    """Return whether an `av.VideoFrame` decoded by `codec` holds two fields.

    HEVC sets the flag on pictures that are a single field already.
    """
    return bool(frame.interlaced_frame) and codec != "hevc" and frame.height > 1


class TopField:
    """Extracts the top field of interlaced frames and passes other frames through.

    Args:
        codec: FFmpeg's name of the codec that the frames are decoded by.
    """

    def __init__(self, codec: str) -> None:
        self._codec, self._filter = codec, FrameFilter()

    def __call__(self, frame: Any) -> Any:
        """Return a progressive frame itself, an interlaced one's lines 0, 2, 4, ... in the same pixel format."""
        return self._filter(frame, ("field", "type=top") if is_interlaced(frame, self._codec) else None)
