"""Find near-identical clips by the perceptual hashes of their frames: candidates by bands of bits, then distances.

N frames of all clips together, each with 256 bits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BITS = 256
BAND = 24  # bits; equal in some frame of nearly every pair that is near (10 bands)
MOST_NEIGHBOURS = 64  # of a frame within a band: what thousands share, such as a logo, would cost their square
CHUNK = 1 << 21  # frame pairs compared at a time


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
    candidates = _candidates(hashes, starts)
    words = np.ascontiguousarray(hashes).view(np.uint64)  # [N, 4]
    counts = np.diff(starts)
    found = []
    sizes = counts[candidates[:, 0]] * counts[candidates[:, 1]] if len(candidates) else np.zeros(0, np.int64)
    bounds = np.searchsorted(np.cumsum(sizes), np.arange(0, sizes.sum() + CHUNK, CHUNK), side="right")
    for low, high in pairwise(bounds.tolist()):
        if low < high:
            pairs = candidates[low:high]
            found.append(pairs[_similar(words, starts, counts, pairs, distance, share)])
    return np.concatenate(found) if found else np.zeros((0, 2), np.int64)


def _candidates(hashes: Array, starts: Array) -> Array:
    """Return [pairs, 2]: clips that have a band of some frame in common."""
    owners = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    clips = len(starts) - 1
    keys = np.zeros(0, np.int64)
    for band in range(BITS // BAND):
        part = hashes[:, 3 * band : 3 * band + 3].astype(np.uint32)
        values = part[:, 0] << 16 | part[:, 1] << 8 | part[:, 2]
        order = np.argsort(values, kind="stable")
        values, sorted_owners = values[order], owners[order]
        found = []
        for ahead in range(1, min(MOST_NEIGHBOURS, len(values) - 1) + 1):
            same = values[ahead:] == values[:-ahead]
            if not same.any():
                break
            left, right = sorted_owners[:-ahead][same], sorted_owners[ahead:][same]
            other = left != right
            first, second = np.minimum(left, right)[other], np.maximum(left, right)[other]
            found.append(first * clips + second)
        keys = np.unique(np.concatenate([keys, *found]))
    return np.stack([keys // max(1, clips), keys % max(1, clips)], axis=1)


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
    parent = list(range(count))

    def find(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    for left, right in pairs.tolist():
        low, high = sorted((find(left), find(right)))
        parent[high] = low
    touched = np.unique(pairs)
    roots = np.arange(count)
    roots[touched] = [find(one) for one in touched.tolist()]
    return roots
