"""What is known of a manifest's clips before they are read: their size and length, and which shape they fit."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from stdit_data import files
from stdit_data.buckets import Bucket, choose_bucket
from stdit_data.errors import ClipError
from stdit_data.manifests.format import Entry, Manifest
from stdit_data.video.frames import Sampling
from stdit_data.video.probe import Probe, probe


def with_metadata(entry: Entry, facts: Probe) -> Entry:
    """The entry with what a probe found where it says nothing itself."""
    return replace(
        entry,
        fps=entry.fps or facts.fps or None,
        width=entry.width or facts.width,
        height=entry.height or facts.height,
        num_frames=entry.num_frames or facts.frames,
    )


def complete_metadata(
    manifest: Manifest, entries: list[Entry], stream: int | None, workers: int, *, lengths: bool
) -> list[Entry]:
    """The entries with their width and height, and where `lengths` matter frames and rate: probed where not given."""

    def complete(entry: Entry) -> Entry:
        known = entry.width and entry.height and (not lengths or (entry.num_frames and entry.fps))
        if known:
            return entry
        try:
            return with_metadata(entry, probe(manifest.locate(entry), stream=stream))
        except ClipError:
            return entry

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(complete, entries))


def frames_within(entry: Entry) -> int | None:
    """Frames of an entry's cut as far as the manifest tells."""
    fps = entry.fps
    if entry.num_frames is None and entry.cut.end is None and entry.cut.end_frame is None:
        return None
    if fps is None and (entry.start is not None or entry.end is not None):
        return None
    return entry.cut.frames(fps or 1.0, entry.num_frames or 2**62)


def known_short(entry: Entry, sampling: Sampling) -> bool:
    """Whether the manifest itself tells that a video is too short."""
    within = frames_within(entry)
    if files.is_image(entry.path) or within is None or (sampling.fps and entry.fps is None):
        return False
    return within < sampling.span(entry.fps or 1.0)


def fitting_bucket(entry: Entry, samplings: Mapping[Bucket, Sampling]) -> Bucket:
    """The shape that an entry goes to, of those that `samplings` names."""
    shapes = list(samplings)
    if len(shapes) == 1:
        return shapes[0]
    if not entry.width or not entry.height:
        return shapes[0]
    if files.is_image(entry.path):
        frames = 1
    else:
        within = frames_within(entry)
        fitting = [
            shape.frames
            for shape, sampling in samplings.items()
            if within is not None and sampling.span(entry.fps or 1.0) <= within
        ]
        frames = max(fitting, default=0)
    return choose_bucket(shapes, frames, entry.height, entry.width)
