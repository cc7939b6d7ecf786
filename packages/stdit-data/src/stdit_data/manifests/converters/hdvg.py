"""HD-VG-130M: one JSON object, keyed by YouTube id, of clips cut from a video and the scenes within each clip.

    {"<youtube id>": {"clip": {"<clip id>.mp4": {"scene_split": [
        {"clip_id": "...", "caption": "...", "scene_cut": [start, end]}, ...]}}}}

`scene_cut` counts frames within the clip; an end of -1 is the clip's own. For academic use; not to be redistributed.
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
    """One entry per scene that has a caption.

    Args:
        metadata: the JSON file.
        videos: the folder of downloaded clips, in any sub-folders; clips not in it are skipped. Without it every
            clip is named as in the metadata.

    Raises:
        DataError: the file isn't an object of this kind.
    """
    data = read_json(metadata)
    if not isinstance(data, Mapping):
        raise DataError(f"{metadata}: {type(data).__name__}; expected one JSON object keyed by YouTube id")
    present = videos_by_name(videos) if videos is not None else None
    done = Conversion()
    for youtube_id, video in data.items():
        clips = _get(video, "clip", Mapping, done)
        for name, clip in (clips or {}).items():
            scenes = _get(clip, "scene_split", list, done) or []
            file = PurePosixPath(name).name
            if present is not None and file not in present:
                done.skipped["clip not in the folder"] += len(scenes)
                continue
            path = file if present is None else present[file]
            for scene in scenes:
                entry = _scene(path, scene, f"HD-VG-130M, YouTube {youtube_id}", done)
                if entry is not None:
                    done.entries.append(entry)
    return done


def _scene(path: str, scene: Any, source: str, done: Conversion) -> Entry | None:
    caption = _get(scene, "caption", str, done)
    if caption is None:
        return None
    if not caption.strip():
        done.skipped["empty caption"] += 1
        return None
    cut = _get(scene, "scene_cut", list, done)
    if cut is None:
        return None
    if len(cut) != 2 or not all(isinstance(frame, int) for frame in cut) or (cut[1] != -1 and cut[1] <= cut[0]):
        done.skipped["scene_cut is not [start, end] in frames"] += 1
        return None
    return Entry(
        path,
        " ".join(caption.split()),
        start_frame=cut[0] or None,
        end_frame=None if cut[1] == -1 else cut[1],
        source=source,
        licence=LICENCE,
    )


def _get(value: Any, key: str, kind: type, done: Conversion) -> Any:
    """`value[key]` where it is there and of its kind; else None, counted under the key's name."""
    if not isinstance(value, Mapping) or key not in value:
        done.skipped[f"key {key!r} missing"] += 1
        return None
    if not isinstance(value[key], kind):
        done.skipped[f"key {key!r} is a {type(value[key]).__name__}"] += 1
        return None
    return value[key]
