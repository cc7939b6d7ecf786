"""Keep one field of interlaced frames, which hold two instants in alternating lines.

Read as they are, moving edges show combing, which a model would learn to draw. Interpolating the missing lines needs
neighbouring frames; a single field is one instant at half the vertical resolution and the same frame rate.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from av.filter import Graph


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
        self._codec = codec
        self._graph: Graph | None = None
        self._kind: tuple[Any, ...] = ()

    def __call__(self, frame: Any) -> Any:
        """Return a progressive frame itself, an interlaced one's lines 0, 2, 4, ... in the same pixel format."""
        if not is_interlaced(frame, self._codec):
            return frame
        kind = frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range
        if self._graph is None or kind != self._kind:
            self._graph, self._kind = _graph(frame), kind
        self._graph.push(frame)
        return self._graph.pull()


def _graph(frame: Any) -> Graph:
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base or Fraction(1, 1000)
    )
    field, sink = graph.add("field", "type=top"), graph.add("buffersink")
    source.link_to(field)
    field.link_to(sink)
    graph.configure()
    return graph
