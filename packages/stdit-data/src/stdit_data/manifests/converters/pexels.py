"""Convert Pexels-style folders: video files, with captions beside them (name.txt) or in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from stdit_data.errors import DataError
from stdit_data.manifests.converters.common import Conversion, read_json
from stdit_data.manifests.format import Entry, read_manifest
from stdit_data.storage import urls

LICENCE = "Pexels licence"


def convert(folder: str, *, captions: str | None = None) -> Conversion:
    """Convert a folder to one entry per captioned video.

    Args:
        folder: folder of the videos, in any sub-folders.
        captions: a manifest (CSV, JSON lines or Parquet with path and caption) or a JSON file: an object of name to
            caption, or a list of objects with a name (path, file, video or id) and a caption (caption or text). A name
            is a file's name or path, with or without suffix. Without it captions are read from name.txt beside each
            video.

    Raises:
        DataError: the folder holds no videos, or the captions are of another form.
    """
    found = read_manifest(folder).entries
    captions_by_name = _captions(captions) if captions is not None else {}
    conversion = Conversion()
    for entry in found:
        caption = _look_up(captions_by_name, entry.path) if captions is not None else entry.caption
        if not caption:
            conversion.skipped["video without a caption"] += 1
            continue
        conversion.entries.append(Entry(entry.path, caption, source="Pexels", licence=LICENCE))
    known = {key for entry in found for key in _keys(entry.path)}
    if unmatched := sum(name not in known for name in captions_by_name):
        conversion.skipped["caption without a video"] = unmatched
    return conversion


def _captions(url: str) -> dict[str, str]:
    if urls.suffix(url) != ".json":
        return {_bare(entry.path): entry.caption for entry in read_manifest(url).entries}
    data = read_json(url)
    if isinstance(data, Mapping):
        pairs = list(data.items())
    elif isinstance(data, list):
        pairs = [(_first(row, "path", "file", "video", "id"), _first(row, "caption", "text")) for row in data]
    else:
        raise DataError(f"{url}: found a {type(data).__name__}; expected an object of name to caption, or a list")
    for name, caption in pairs:
        if not isinstance(caption, str) or name is None:
            raise DataError(f"{url}: {name!r} has {caption!r}; expected a name and a caption (text) for each")
    return {_bare(str(name)): " ".join(caption.split()) for name, caption in pairs}


def _first(row: Any, *keys: str) -> Any:
    return next((row[key] for key in keys if key in row), None) if isinstance(row, Mapping) else None


def _bare(path: str) -> str:
    """Strip a video's suffix from a path; other dots are part of the name."""
    return str(PurePosixPath(path).with_suffix("")) if urls.suffix(path) in urls.VIDEO_SUFFIXES else path


def _keys(path: str) -> tuple[str, str]:
    return _bare(path), PurePosixPath(_bare(path)).name


def _look_up(captions_by_name: Mapping[str, str], path: str) -> str:
    return next((captions_by_name[key] for key in _keys(path) if key in captions_by_name), "")
