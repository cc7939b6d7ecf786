"""Convert HD-VG-130M: one JSON object, keyed by YouTube id, of a video's clips and the scenes within each clip.

    {"<youtube id>": {"clip": {"<clip id>.mp4": {"scene_split": [
        {"clip_id": "...", "caption": "...", "scene_cut": [start, end]}, ...]}}}}

`scene_cut` counts frames within the clip; an end of -1 is the clip's end. For academic use; not to be redistributed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from stdit_data.errors import DataError
from stdit_data.manifests.converters.common import Conversion, read_json, videos_by_name
from stdit_data.manifests.format import Entry

LICENCE = "HD-VG-130M: academic use only, no redistribution"


def convert(metadata: str, *, videos: str | None = None) -> Conversion:
    """Convert the metadata to one entry per captioned scene.

    Args:
        metadata: the JSON file.
        videos: folder of the downloaded clips, in any sub-folders; other clips are skipped. Without it all clips are
            kept, with paths as in the metadata.

    Raises:
        DataError: a file or folder does not exist, or the metadata is not of this form.
    """
    data = read_json(metadata)
    if not isinstance(data, Mapping):
        raise DataError(f"{metadata}: found a {type(data).__name__}; expected one JSON object keyed by YouTube id")
    present = videos_by_name(videos) if videos is not None else None
    conversion = Conversion()
    for youtube_id, video in data.items():
        clips = _get(video, "clip", Mapping, conversion)
        for name, clip in (clips or {}).items():
            scenes = _get(clip, "scene_split", list, conversion) or []
            file = PurePosixPath(name).name
            if present is not None and file not in present:
                conversion.skipped["clip not in the folder"] += len(scenes)
                continue
            path = file if present is None else present[file]
            for scene in scenes:
                entry = _scene(path, scene, f"HD-VG-130M, YouTube {youtube_id}", conversion)
                if entry is not None:
                    conversion.entries.append(entry)
    return conversion


def _scene(path: str, scene: Any, source: str, conversion: Conversion) -> Entry | None:
    caption = _get(scene, "caption", str, conversion)
    if caption is None:
        return None
    if not caption.strip():
        conversion.skipped["empty caption"] += 1
        return None
    bounds = _get(scene, "scene_cut", list, conversion)
    if bounds is None:
        return None
    if (
        len(bounds) != 2
        or not all(isinstance(frame, int) for frame in bounds)
        or (bounds[1] != -1 and bounds[1] <= bounds[0])
    ):
        conversion.skipped["scene_cut is not [start, end] in frames"] += 1
        return None
    return Entry(
        path,
        " ".join(caption.split()),
        start_frame=bounds[0] or None,
        end_frame=None if bounds[1] == -1 else bounds[1],
        source=source,
        licence=LICENCE,
    )


def _get(value: Any, key: str, kind: type, conversion: Conversion) -> Any:
    """Return `value[key]`; None, counted as skipped, if it is missing or not of type `kind`."""
    if not isinstance(value, Mapping) or key not in value:
        conversion.skipped[f"key {key!r} missing"] += 1
        return None
    if not isinstance(value[key], kind):
        conversion.skipped[f"key {key!r} is a {type(value[key]).__name__}"] += 1
        return None
    return value[key]
