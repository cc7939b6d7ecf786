"""Complete the sizes and lengths of a manifest's entries by probing, and choose their buckets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from stdit_data import stores, urls
from stdit_data.buckets import Bucket, choose_bucket
from stdit_data.errors import ClipError
from stdit_data.manifests.format import Entry, Manifest
from stdit_data.video.frames import Sampling
from stdit_data.video.probe import Probe, probe


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
    entries: list[Entry],
    stream: int | None,
    workers: int,
    *,
    lengths: bool,
    once: Callable[[Callable[[], Found]], Found] = lambda probe_all: probe_all(),
) -> list[Entry]:
    """Return the entries with missing metadata filled in by probing their files in threads.

    Entries whose file can't be probed stay as they are.

    Args:
        manifest: the manifest that locates the entries' files.
        entries: the entries to complete.
        stream: number of the video stream, from 0; None for FFmpeg's choice.
        workers: number of threads.
        lengths: also fill in num_frames and fps, besides width and height.
        once: calls a function that probes and returns its result; of several processes one calls it for all.

    Raises:
        StoreError: a store does not answer.
    """

    def is_known(entry: Entry) -> bool:
        return bool(entry.width and entry.height and (not lengths or (entry.num_frames and entry.fps)))

    def probed(row: int) -> tuple[int, Probe | None]:
        try:
            return row, probe(manifest.locate(entries[row]), stream=stream)
        except ClipError:
            return row, None

    def probe_all() -> Found:
        with stores.threads(workers) as pool:
            rows = (row for row, entry in enumerate(entries) if not is_known(entry))
            return {row: found for row, found in pool.map(probed, rows) if found is not None}

    found = once(probe_all)
    return [with_metadata(entry, found[row]) if row in found else entry for row, entry in enumerate(entries)]


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


def is_known_short(entry: Entry, sampling: Sampling) -> bool:
    """Return whether a video is too short for `sampling` by the manifest's own metadata."""
    available = known_frames(entry)
    if is_picture(entry) or available is None or (sampling.fps and entry.fps is None):
        return False
    return available < sampling.span(entry.fps or 1.0)


def entry_bucket(entry: Entry, samplings: Mapping[Bucket, Sampling]) -> Bucket:
    """Choose the bucket of an entry among the keys of `samplings`; the first if the entry's size is unknown."""
    shapes = list(samplings)
    if len(shapes) == 1:
        return shapes[0]
    if not entry.width or not entry.height:
        return shapes[0]
    if is_picture(entry):
        frames = 1
    else:
        available = known_frames(entry)
        fitting = [
            shape.frames
            for shape, sampling in samplings.items()
            if available is not None and sampling.span(entry.fps or 1.0) <= available
        ]
        frames = max(fitting, default=0)
    return choose_bucket(shapes, frames, entry.height, entry.width)
