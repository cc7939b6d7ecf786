"""UCF-101: a folder per action, `ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi`; the action is the caption."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from stdit_data import files
from stdit_data.errors import DataError
from stdit_data.manifests.converters.common import Conversion
from stdit_data.manifests.format import Entry, read_manifest

NAME = re.compile(r"v_(?P<action>[A-Za-z0-9]+)_g\d+_c\d+$")


def convert(folder: str, *, split: str | None = None, template: str = "{action}") -> Conversion:
    """One entry per video.

    Args:
        folder: the unpacked set.
        split: one of its lists (trainlist01.txt); only what it names.
        template: the caption, with `{action}` for the action in words ("apply eye makeup").

    Raises:
        DataError: no videos named as in the set, no such list, or a template without `{action}`.
    """
    if "{action}" not in template:
        raise DataError(f"template {template!r}: expected {{action}} in it")
    wanted = _listed(split) if split is not None else None
    done = Conversion()
    for entry in read_manifest(folder).entries:
        name = PurePosixPath(entry.path).stem
        match = NAME.match(name)
        if match is None:
            done.skipped["not named v_Action_gNN_cNN"] += 1
        elif wanted is not None and name not in wanted:
            done.skipped["not in the list"] += 1
        else:
            caption = template.replace("{action}", words(match["action"]))
            done.entries.append(Entry(entry.path, caption, source="UCF-101"))
    return done


def words(action: str) -> str:
    """`ApplyEyeMakeup` to `apply eye makeup`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", action).lower()


def _listed(url: str) -> set[str]:
    if not files.exists(url):
        raise DataError(f"{url}: no such list")
    lines = (line.split() for line in files.read_text(url).splitlines())
    return {PurePosixPath(line[0]).stem for line in lines if line}
