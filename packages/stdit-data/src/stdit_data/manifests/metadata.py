"""Complete the sizes and lengths of a manifest's entries by probing, and choose their buckets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stdit_data.bucket_column import BucketColumn
from stdit_data.buckets import Bucket, choose_bucket
from stdit_data.errors import ClipError
from stdit_data.manifests.arrays import codes, flags, floats
from stdit_data.manifests.entries import BLOCK, Entries, Entry
from stdit_data.manifests.format import Manifest
from stdit_data.storage import readers, urls
from stdit_data.video.probe import Probe, probe
from stdit_data.video.segments import Sampling

LENGTHS = ("start", "end", "start_frame", "end_frame", "num_frames")
PROBED = ("fps", "width", "height", "num_frames")
EXACT = 2**52  # a float holds every whole number up to here, and some more
CLOSE = 1e-9  # relative; floats that differ by less are compared as fractions

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def with_metadata(entry: Entry, metadata: Probe) -> Entry:
    """Return the entry with its missing fps, width, height and num_frames filled in from a probe."""
    return replace(
        entry,
        fps=entry.fps or metadata.fps or None,
        width=entry.width or metadata.width,
        height=entry.height or metadata.height,
        num_frames=entry.num_frames or metadata.frames,
    )


Found = dict[int, Probe]  # by the number of an entry, from 0


def complete_metadata(
    manifest: Manifest,
    stream: int | None,
    workers: int,
    *,
    lengths: bool,
    once: Callable[[Callable[[], Found]], Found] = lambda probe_all: probe_all(),
) -> Entries:
    """Return a manifest's entries with missing metadata filled in by probing their files in threads.

    Entries whose file can't be probed stay as they are.

    Args:
        manifest: the manifest.
        stream: number of the video stream, from 0; None for FFmpeg's choice.
        workers: number of threads.
        lengths: also fill in num_frames and fps, besides width and height.
        once: calls a function that probes and returns its result; of several processes one calls it for all.

    Raises:
        StoreError: a store does not answer, or a disk fails.
    """

    def probed(row: int) -> tuple[int, Probe | None]:
        try:
            return row, probe(manifest.locate(manifest.entries[row]), stream=stream)
        except ClipError:
            return row, None

    def probe_all() -> Found:
        rows = map(int, unknown_metadata(manifest.entries, lengths=lengths))
        return {row: found for row, found in readers.map_in_threads(probed, rows, workers) if found is not None}

    found = once(probe_all)
    return with_probes(manifest.entries, found) if found else manifest.entries


def unknown_metadata(entries: Entries, *, lengths: bool) -> NDArray[np.int64]:
    """Return the numbers of the entries whose size (and, with `lengths`, length and rate) is not known."""
    names = PROBED if lengths else ("width", "height")
    unknown = [np.isnan(entries.numbers(name)) for name in names]
    return np.flatnonzero(np.logical_or.reduce(unknown)).astype(np.int64)


def with_probes(entries: Entries, probes: Found) -> Entries:
    """Return the entries with the missing metadata of some filled in, as `with_metadata` does."""
    columns = {name: entries.numbers(name) for name in PROBED}
    for row, found in probes.items():
        entry = with_metadata(entries[row], found)
        for name, values in columns.items():
            value = getattr(entry, name)
            values[row] = np.nan if value is None else value
    return entries.replaced(columns)


def known_frames(entry: Entry) -> int | None:
    """Return the number of frames of an entry's segment, or None if the manifest does not determine it."""
    fps = entry.fps
    if entry.num_frames is None and entry.segment.end is None and entry.segment.end_frame is None:
        return None
    if fps is None and (entry.start is not None or entry.end is not None):
        return None
    return entry.segment.frames(fps or 1.0, entry.num_frames or 2**62)


def is_picture(entry: Entry) -> bool:
    """Return whether an entry is a single picture by its suffix; animated WebP and PNG files have `num_frames`."""
    return urls.is_image(entry.path) and (entry.num_frames or 1) == 1


class Lengths:
    """What a manifest tells of the lengths of its entries.

    Args:
        entries: the entries, N of them.

    Attributes:
        frames: number of frames as `known_frames` gives it, [N], NaN where it is unknown.
        fps: frames per second, [N], NaN where it is unknown.
        pictures: which are single pictures, [N].
    """

    def __init__(self, entries: Entries) -> None:
        self.fps, self.pictures = entries.numbers("fps"), _pictures(entries)
        self.frames = _known_frames(entries, self.fps)

    def part(self, rows: slice) -> Lengths:
        """Return the lengths of some entries, in the same memory."""
        part = copy(self)
        part.fps, part.pictures, part.frames = self.fps[rows], self.pictures[rows], self.frames[rows]
        return part

    def short(self, sampling: Sampling) -> Flags:
        """Return which entries are too short for `sampling` by the manifest's own metadata, [N]."""
        known = ~self.pictures & ~np.isnan(self.frames)
        if sampling.fps:
            known &= ~np.isnan(self.fps)
        return known & self.below(sampling)

    def below(self, sampling: Sampling) -> Flags:
        """Return which entries have fewer frames than `sampling` spans, at 1 fps where the rate is unknown, [N]."""
        fps = np.where(np.isnan(self.fps), 1.0, self.fps)
        if sampling.interval:
            return self.frames < float(sampling.span(1))
        with np.errstate(all="ignore"):
            need = 1 + (sampling.frames - 1) * (fps / (sampling.fps or 1))
            doubtful = ~(np.abs(self.frames - need) > CLOSE * need) & ~np.isnan(self.frames)
        below: Flags = self.frames < need
        pairs, which = np.unique(np.stack([self.frames[doubtful], fps[doubtful]]), axis=1, return_inverse=True)
        below[doubtful] = np.array([frames < sampling.span(rate) for frames, rate in pairs.T], bool)[which.reshape(-1)]
        return below


def choose_buckets(entries: Entries, lengths: Lengths, samplings: Mapping[Bucket, Sampling]) -> BucketColumn:
    """Choose the bucket of each entry among the keys of `samplings`; the first where the entry's size is unknown."""
    shapes = list(samplings)
    if len(shapes) == 1:
        return BucketColumn(shapes, np.zeros(len(entries), np.uint8))
    numbers = np.zeros(len(entries), np.uint16)
    heights, widths = entries.numbers("height"), entries.numbers("width")
    for start in range(0, len(entries), BLOCK):
        rows = slice(start, start + BLOCK)
        part = lengths.part(rows)
        frames = np.zeros(len(part.frames))
        for shape, sampling in samplings.items():
            fits = ~part.below(sampling) & ~np.isnan(part.frames)
            frames[fits] = np.maximum(frames[fits], shape.frames)
        frames[part.pictures] = 1
        sizes = np.stack([frames, heights[rows], widths[rows]])
        known = ~np.isnan(sizes).any(axis=0)
        distinct, which = _distinct(sizes[:, known])
        chosen = [shapes.index(choose_bucket(shapes, *map(int, size))) for size in distinct]
        numbers[rows][known] = np.array(chosen, np.uint16)[which]
    return BucketColumn(shapes, numbers)


def _distinct(columns: Floats) -> tuple[list[tuple[float, ...]], NDArray[np.int64]]:
    """Return the distinct columns of an array [K, N], and the number among them of each, [N]."""
    code = np.zeros(columns.shape[1], np.int64)
    for row in columns:
        values, which = codes(row)
        _, code = codes(code * len(values) + which)
    first = np.unique(code, return_index=True)[1]
    return [tuple(columns[:, i]) for i in first], code


def _pictures(entries: Entries) -> Flags:
    """As `is_picture`, for all entries: by an expression where that is sure."""
    suffixes = "|".join(suffix[1:] for suffix in urls.IMAGE_SUFFIXES)
    found = np.zeros(len(entries), bool)
    start = 0
    for block in entries.blocks(["path"]):
        maybe = flags(pc.match_substring_regex(block["path"], rf"(?i)\.(?:{suffixes})"))
        if maybe.any():
            sure = flags(pc.match_substring_regex(block["path"], rf"(?i)^[^:]*[^/.:]\.(?:{suffixes})$"))
            found[start : start + len(block)] = sure
            for row in np.flatnonzero(maybe & ~sure):
                found[start + row] = urls.is_image(entries.value("path", start + int(row)))
        start += len(block)
    if found.any():
        frames = entries.numbers("num_frames")
        found &= np.isnan(frames) | (frames == 1)
    return found


def _known_frames(entries: Entries, fps: Floats) -> Floats:
    """As `known_frames`, for all entries: in floats, and as fractions where these are too close to a frame's bound."""
    frames = np.full(len(entries), np.nan)
    begin = 0
    for block in entries.blocks(LENGTHS) if set(LENGTHS) & set(entries.table.column_names) else ():
        rows = slice(begin, begin + len(block))
        frames[rows], doubtful = _frames_of(block, fps[rows])
        for row in np.flatnonzero(doubtful):
            frames[begin + row] = known_frames(entries[begin + int(row)])
        begin += len(block)
    return frames


def _frames_of(block: pa.RecordBatch, fps: Floats) -> tuple[Floats, Flags]:
    """Return the number of frames of each row, NaN where it is unknown, and where rounding might give another one."""
    nothing = np.full(len(block), np.nan)
    columns = [floats(block[name]) if name in block.schema.names else nothing for name in LENGTHS]
    start, end, first, last, total = columns
    bound = [_first_frame(seconds, fps) for seconds in (start, end)]
    low = np.where(np.isnan(start), np.nan_to_num(first), bound[0][0])
    high = np.where(np.isnan(end), last, bound[1][0])
    frames: Floats = np.maximum(np.fmin(high, total) - low, 0)
    unknown = np.isnan(total) & np.isnan(end) & np.isnan(last)
    unknown |= np.isnan(fps) & ~(np.isnan(start) & np.isnan(end))
    doubtful = bound[0][1] | bound[1][1]
    for values in (low, high, total):
        doubtful |= np.abs(values) > EXACT
    frames[unknown] = np.nan
    return frames, doubtful & ~unknown


def _first_frame(seconds: Floats, fps: Floats) -> tuple[Floats, Flags]:
    """Return the first frame from a time on, see `Segment`, and where rounding might give another one."""
    with np.errstate(all="ignore"):
        place = seconds * fps - np.minimum(fps / 1000, 0.25)
        near = ~(np.abs(place - np.rint(place)) > CLOSE * np.maximum(1, np.abs(place)))
    return np.ceil(place), near & ~np.isnan(seconds)
