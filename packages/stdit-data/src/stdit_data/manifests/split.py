"""Split clips into training and validation sets.

A clip is held out by a hash of its file's name, not by its position. So the split stays the same when clips are added,
removed or reordered, when the data set is moved or encoded to a cache, and all segments of a file are on the same side.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from stdit_data.errors import DataError
from stdit_data.urls import canonical, layers, printable


def hash_position(url: str) -> float:
    """Hash a file to a number in [0, 1), from its name, its folder's name and the names of its archives."""
    rest = url.partition("://")[2] or url
    if rest.isascii() and rest.count("/") > 1 and not re.search(r"//|/\.|::|/$", rest):  # nearly always, and faster
        parts = rest.rsplit("/", 2)[-2:]
        return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:7]) / 2**56
    head, *archives = layers(canonical(printable(url)))
    parts = [*PurePosixPath(head).parts[-2:], *(PurePosixPath(layer).name for layer in archives)]
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:7]) / 2**56


def split(clips: Iterable[str], share: float) -> tuple[list[int], list[int]]:
    """Split clips into those to train on and those held out.

    Args:
        clips: paths or URLs of all clips.
        share: share of the files to hold out, between 0 and 1; a larger share includes the files of a smaller one.

    Returns:
        Indices of the clips to train on, in order, and of those held out, by ascending `hash_position`.

    Raises:
        DataError: one of the two would be empty.
    """
    positions, last, position = [], None, 0.0
    for url in clips:
        if url != last:  # the segments of a file are neighbours
            last, position = url, hash_position(url)
        positions.append(position)
    kept = [index for index, position in enumerate(positions) if position >= share]
    held = [index for index, position in enumerate(positions) if position < share]
    if not held or not kept:
        which = "none is held out" if not held else "none is left to train on"
        raise DataError(f"of {len(positions)} clips {which} at a share of {share:g}")
    return kept, sorted(held, key=lambda index: (positions[index], index))
