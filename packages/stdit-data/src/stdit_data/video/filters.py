"""Pass decoded frames through one of FFmpeg's filters."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from av.filter import Graph


class FrameFilter:
    """Filters frames one by one; the graph is kept while their kind stays the same."""

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._kind: tuple[Any, ...] = ()

    def __call__(self, frame: Any, wanted: tuple[str, str] | None) -> Any:
        """Return an `av.VideoFrame` as filtered by `wanted`, a filter's name and options; itself for None."""
        if wanted is None:
            return frame
        kind = wanted, frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range
        if self._graph is None or kind != self._kind:
            self._graph, self._kind = _graph(frame, *wanted), kind
        self._graph.push(frame)
        return self._graph.pull()


def _graph(frame: Any, name: str, options: str) -> Graph:
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base or Fraction(1, 1000)
    )
    chosen, sink = graph.add(name, options), graph.add("buffersink")
    source.link_to(chosen)
    chosen.link_to(sink)
    graph.configure()
    return graph
