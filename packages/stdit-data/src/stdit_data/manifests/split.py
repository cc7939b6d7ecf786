"""Which clips of a set are kept out of training, to validate on.

A clip is held out by a hash of its file's name, not by its place in the set: so the choice stays as it is when clips
are added, left out or listed in another order, when the set is moved, and when it is encoded to a cache; and all cuts
of one file lie on the same side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import PurePosixPath

from stdit_data import files
from stdit_data.errors import DataError


def hash_position(url: str) -> float:
    """A number in [0, 1) for a file, from its name, that of the folder that it lies in, and those of its archives."""
    head, *archives = files.canonical(url).split("::")
    parts = [*PurePosixPath(head).parts[-2:], *(PurePosixPath(layer).name for layer in archives)]
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:7]) / 2**56


def split(urls: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """The places of the clips to train on, in order, and of those held out, by ascending `hash_position`.

    Args:
        urls: of all clips.
        share: of the files that is held out, above 0 and below 1; of a larger share those of a smaller one are part.

    Raises:
        DataError: one of the two would be empty.
    """
    positions = [hash_position(url) for url in urls]
    kept = [index for index, position in enumerate(positions) if position >= share]
    held = [index for index, position in enumerate(positions) if position < share]
    if not held or not kept:
        which = "none is held out" if not held else "none is left to train on"
        raise DataError(f"of {len(urls)} clips {which} at a share of {share:g}")
    return kept, sorted(held, key=lambda index: (positions[index], index))
