"""Find near-identical clips by the perceptual hashes of their frames: candidates by bands of bits, then distances.

N frames of all clips together, each with 256 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BITS = 256
BAND = 24  # bits; equal in some frame of nearly every pair that is near (10 bands)
MOST_NEIGHBOURS = 64  # of a frame within a band: what thousands share, such as a logo, would cost their square
CHUNK = 1 << 20  # frame pairs compared at a time
FRAME_BITS = 38  # of the number of a frame, beside the bits of a band


def near_pairs(hashes: Array, starts: Array, *, distance: int, share: float) -> Array:
    """Return the pairs of clips of which most frames are near.

    Args:
        hashes: [N, 32] uint8, clip after clip.
        starts: [clips + 1]: where each clip's frames begin, and N.
        distance: bits that two frames may differ in.
        share: of the frames of the clip with fewer of them that must be near one of the other's.

    Returns:
        [pairs, 2] clip numbers, the smaller first, sorted.
    """
    words = np.ascontiguousarray(hashes).view(np.uint64)  # [N, 4]
    candidates = _candidates(hashes, words, starts, distance)
    counts = np.diff(starts)
    found = []
    sizes = counts[candidates[:, 0]] * counts[candidates[:, 1]] if len(candidates) else np.zeros(0, np.int64)
    bounds = np.searchsorted(np.cumsum(sizes), np.arange(0, sizes.sum() + CHUNK, CHUNK), side="right")
    for low, high in pairwise(bounds.tolist()):
        if low < high:
            pairs = candidates[low:high]
            found.append(pairs[_similar(words, starts, counts, pairs, distance, share)])
    return np.concatenate(found) if found else np.zeros((0, 2), np.int64)


def _candidates(hashes: Array, words: Array, starts: Array, distance: int) -> Array:
    """Return [pairs, 2]: clips of which two frames are near and have a band in common."""
    clips = len(starts) - 1
    owners = np.repeat(np.arange(clips), np.diff(starts))
    keys = np.zeros(0, np.int64)
    for band in range(BITS // BAND):
        for left, right in _same_band(hashes[:, 3 * band : 3 * band + 3]):
            # Among millions of frames most that share a band do so by chance.
            near = np.bitwise_count(words[left] ^ words[right]).sum(axis=1, dtype=np.uint16) <= distance
            one, other = owners[left[near]], owners[right[near]]
            found = np.minimum(one, other) * clips + np.maximum(one, other)
            keys = np.union1d(keys, found[one != other])
    return np.stack([keys // max(1, clips), keys % max(1, clips)], axis=1)


def _same_band(part: Array) -> Iterator[tuple[Array, Array]]:
    """Yield the frames whose band [N, 3] is equal, in pairs: each with up to `MOST_NEIGHBOURS` that come after it."""
    # Sorting numbers of band and frame is several times faster than argsort.
    band = part[:, 0].astype(np.int64) << 16 | part[:, 1].astype(np.int64) << 8 | part[:, 2]
    band <<= FRAME_BITS
    band |= np.arange(len(part))
    band.sort()
    frames, values = band & ((1 << FRAME_BITS) - 1), band >> FRAME_BITS
    places = np.arange(len(values))
    for ahead in range(1, MOST_NEIGHBOURS + 1):
        places = places[: np.searchsorted(places, len(values) - ahead)]
        places = places[values[places] == values[places + ahead]]
        for start in range(0, len(places), CHUNK):
            chosen = places[start : start + CHUNK]
            yield frames[chosen], frames[chosen + ahead]
        if not len(places):
            break


def _similar(words: Array, starts: Array, counts: Array, pairs: Array, distance: int, share: float) -> Array:
    """Return for each pair whether enough frames are near."""
    swap = counts[pairs[:, 0]] > counts[pairs[:, 1]]
    fewer, more = np.where(swap, pairs[:, 1], pairs[:, 0]), np.where(swap, pairs[:, 0], pairs[:, 1])
    rows, columns = counts[fewer], counts[more]
    # Every frame of the clip with fewer, against every frame of the other: a ragged product, written out flat.
    frame_pair = np.repeat(np.arange(len(pairs)), rows)
    frame = np.arange(len(frame_pair)) - np.repeat(np.cumsum(rows) - rows, rows)
    left = starts[fewer][frame_pair] + frame
    width = columns[frame_pair]
    line = np.repeat(np.arange(len(left)), width)
    column = np.arange(len(line)) - np.repeat(np.cumsum(width) - width, width)
    right = starts[more][frame_pair][line] + column
    near = np.bitwise_count(words[left[line]] ^ words[right]).sum(axis=1) <= distance
    frame_near = np.zeros(len(left), bool)
    frame_near[line[near]] = True
    matched = np.bincount(frame_pair[frame_near], minlength=len(pairs))
    return np.asarray(matched >= share * rows)


def groups_of(count: int, pairs: Array) -> Array:
    """Return [count]: for each item the smallest item that pairs connect it with, itself if there is none."""
    roots = np.arange(count)
    left, right = pairs.reshape(-1, 2).T
    while (roots[left] != roots[right]).any():
        one, other = roots[left], roots[right]
        low = np.minimum(one, other)
        np.minimum.at(roots, one, low)
        np.minimum.at(roots, other, low)
        while (roots != roots[roots]).any():
            roots = roots[roots]
    return roots
