"""Helpers of the converters: the result, and reading their inputs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from stdit_data.errors import DataError
from stdit_data.manifests.format import Entry, write_manifest
from stdit_data.storage import files, listing, urls


@dataclass(slots=True)
class Conversion:
    """The entries converted, and how many were skipped by reason."""

    entries: list[Entry] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def write(self, url: str, *, folder: str | None = None) -> int:
        """Write the entries as a manifest.

        Args:
            url: the manifest to write.
            folder: the folder that the entries' paths start from. They are written relative to the manifest if that
                lies in or above the folder, else in full.

        Returns:
            The number of entries written.

        Raises:
            DataError: nothing was converted (the message gives the reasons), or the file can't be written.
        """
        if not self.entries:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.skipped.most_common(5)) or "no entries"
            raise DataError(f"{url}: nothing to write ({reasons})")
        return write_manifest(url, [replace(entry, path=_placed(entry.path, folder, url)) for entry in self.entries])


def read_json(url: str) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file does not exist or is not JSON.
    """
    if not files.exists(url):
        raise DataError(f"{url}: no such file")
    try:
        return json.loads(files.read_text(url))
    except json.JSONDecodeError as error:
        raise DataError(f"{url}: not JSON ({error.msg} in line {error.lineno})") from None


def videos_by_name(folder: str, suffixes: Iterable[str] = urls.VIDEO_SUFFIXES) -> dict[str, str]:
    """Find the videos in a folder and its sub-folders, as file name to path within the folder.

    Raises:
        DataError: the folder does not exist or holds no videos.
    """
    if not files.is_folder(folder):
        raise DataError(f"{folder}: no such folder")
    found = {PurePosixPath(path).name: path for path in listing.walk(folder) if urls.suffix(path) in suffixes}
    if not found:
        raise DataError(f"{folder}: no videos in this folder or below")
    return found


def _placed(path: str, folder: str | None, manifest: str) -> str:
    if folder is None:
        return path
    full = urls.join(folder, path)
    if not (urls.is_local(full) and urls.is_local(manifest)):
        return full
    absolute, home = urls.local_path(full).absolute(), urls.local_path(manifest).absolute().parent
    return str(absolute.relative_to(home)) if absolute.is_relative_to(home) else str(Path(absolute))
