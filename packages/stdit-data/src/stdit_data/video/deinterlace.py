"""Interlaced frames: two pictures of different moments, line by line. One of them is kept.

Read as they are, moving edges are combs, which a model would learn to draw. Interpolating the missing lines needs the
frames around; a single field is a true picture of one moment, at the rate of the frames and with half of the lines.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from av.filter import Graph


def is_interlaced(frame: Any, codec: str) -> bool:
    """Whether a frame of a video in `codec` holds two fields. HEVC marks pictures that are one field already."""
    return bool(frame.interlaced_frame) and codec != "hevc" and frame.height > 1


class OneField:
    """Takes the top field of interlaced frames, and leaves others as they are."""

    def __init__(self, codec: str) -> None:
        self._codec = codec
        self._graph: Graph | None = None
        self._kind: tuple[Any, ...] = ()

    def __call__(self, frame: Any) -> Any:
        """The frame, or its lines 0, 2, 4, ... as a frame of half its height, in the same pixel format and colours."""
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
