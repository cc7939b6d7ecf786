"""Any number of frames from a model of short clips: which windows to sample, one after another."""

from typing import NamedTuple


class Window(NamedTuple):
    """Frames `start` to `stop` (not counted), of which the first `known` are there already."""

    start: int
    stop: int
    known: int


def plan_windows(total: int, known: int, window: int, overlap: int) -> list[Window]:
    """Windows that together reach `total` frames, each starting `overlap` frames before what is new in it.

    All have the length of `window`, the one that the model was trained on; the last is moved back rather than cut
    short, so that it overlaps more.

    Args:
        total: frames wanted.
        known: frames that are there at the start, 0 for none.
        window: frames that the model makes at once.
        overlap: frames of the past that a window goes on from.

    Raises:
        ValueError: an overlap that leaves nothing new, or nothing to make.
    """
    if not 0 < overlap < window:
        raise ValueError(f"an overlap of {overlap} frames in windows of {window}: take 1 to {window - 1}")
    if known >= total:
        raise ValueError(f"{known} frames are given and {total} wanted: nothing is left to make")
    if total <= window:
        return [Window(0, total, known)]
    windows = []
    while known < total:
        start = min(max(known - overlap, 0), total - window)
        windows.append(Window(start, start + window, known - start))
        known = start + window
    return windows
