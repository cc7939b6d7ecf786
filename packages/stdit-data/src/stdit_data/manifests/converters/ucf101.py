"""Convert UCF-101: a folder per action, `ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi`; the action is the caption."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from stdit_data.errors import DataError
from stdit_data.manifests.converters.common import Conversion
from stdit_data.manifests.format import Entry, read_manifest
from stdit_data.storage import files

NAME = re.compile(r"v_(?P<action>[A-Za-z0-9]+)_g\d+_c\d+$")


def convert(folder: str, *, split: str | None = None, template: str = "{action}") -> Conversion:
    """Convert the data set to one entry per video.

    Args:
        folder: folder of the unpacked data set.
        split: one of its lists (trainlist01.txt), to keep only the videos that it names.
        template: template of the captions; `{action}` stands for the action in words ("apply eye makeup").

    Raises:
        DataError: the folder holds no videos, the list does not exist, or the template lacks `{action}`.
    """
    if "{action}" not in template:
        raise DataError(f"template {template!r}: expected {{action}} in it")
    wanted = _listed(split) if split is not None else None
    conversion = Conversion()
    for entry in read_manifest(folder).entries:
        name = PurePosixPath(entry.path).stem
        match = NAME.match(name)
        if match is None:
            conversion.skipped["not named v_Action_gNN_cNN"] += 1
        elif wanted is not None and name not in wanted:
            conversion.skipped["not in the list"] += 1
        else:
            caption = template.replace("{action}", words(match["action"]))
            conversion.entries.append(Entry(entry.path, caption, source="UCF-101"))
    return conversion


def words(action: str) -> str:
    """Split a name in camel case into lower-case words: `ApplyEyeMakeup` to `apply eye makeup`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", action).lower()


def _listed(url: str) -> set[str]:
    if not files.exists(url):
        raise DataError(f"{url}: no such list")
    lines = (line.split() for line in files.read_text(url).split("\n"))
    return {PurePosixPath(line[0]).stem for line in lines if line}
