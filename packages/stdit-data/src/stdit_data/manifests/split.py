"""Split clips into training and validation sets.

A clip is held out by a hash of its file's name, not by its position. So the split stays the same when clips are added,
removed or reordered, when the data set is moved or encoded to a cache, and all segments of a file are on the same side.
So are all clips of a group, such as copies of one clip: if the hash of any of them holds it out, it holds them all out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from stdit_data.errors import DataError
from stdit_data.storage.urls import canonical, layers, printable


def hash_position(url: str) -> float:
    """Hash a file to a number in [0, 1), from its name, its folder's name and the names of its archives."""
    rest = url.partition("://")[2] or url
    if rest.isascii() and rest.count("/") > 1 and not re.search(r"//|/\.|::|/$", rest):  # nearly always, and faster
        parts = rest.rsplit("/", 2)[-2:]
        return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:7]) / 2**56
    head, *archives = layers(canonical(printable(url)))
    parts = [*PurePosixPath(head).parts[-2:], *(PurePosixPath(layer).name for layer in archives)]
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:7]) / 2**56


def split(
    clips: Iterable[str], share: float, groups: Iterable[str | None] | None = None
) -> tuple[list[int], list[int]]:
    """Split clips into those to train on and those held out.

    Args:
        clips: paths or URLs of all clips.
        share: share of the files to hold out, between 0 and 1; a larger share includes the files of a smaller one.
        groups: the group of each clip, None for those of none. Groups are held out more often than files.

    Returns:
        Indices of the clips to train on, in order, and of those held out, by ascending `hash_position`, of which that
        of a group is the smallest of its clips.

    Raises:
        DataError: one of the two would be empty.
    """
    positions, last, position = [], None, 0.0
    for url in clips:
        if url != last:  # the segments of a file are neighbours
            last, position = url, hash_position(url)
        positions.append(position)
    if groups is not None:
        positions = _least(positions, groups)
    kept = [index for index, position in enumerate(positions) if position >= share]
    held = [index for index, position in enumerate(positions) if position < share]
    if not held or not kept:
        which = "none is held out" if not held else "none is left to train on"
        whole = "" if groups is None else ", since the clips of a group stay together"
        raise DataError(f"of {len(positions)} clips {which} at a share of {share:g}{whole}")
    return kept, sorted(held, key=lambda index: (positions[index], index))


def _least(files: Sequence[float], groups: Iterable[str | None]) -> list[float]:
    """Give all clips of a group, and all segments of a file, the smallest position that any of them has.

    Args:
        files: the position of each clip's file, which is also what tells files apart.
        groups: the group of each clip, or None.
    """
    ties = [(file,) if group is None else (file, group) for file, group in zip(files, groups, strict=True)]
    found, before = list(files), None
    while found != before:  # files may be in several groups
        before, least = found, dict[float | str, float]()
        for keys, position in zip(ties, before, strict=True):
            for key in keys:
                least[key] = min(position, least.get(key, position))
        found = [min(least[key] for key in keys) for keys in ties]
    return found
