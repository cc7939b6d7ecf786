"""Brings parts of a cache together that were made in different places."""

from __future__ import annotations

from collections.abc import Callable

from stdit_data import files
from stdit_data.errors import DataError
from stdit_data.latents import format as cache
from stdit_data.latents.dataset import LatentDataset


def merge(
    into: str, other: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[cache.Part, bool]:
    """Copies what `other` has of a cache and `into` lacks: whole parts, or shards of a part that both have begun.

    Files are copied whole, so an interrupted merge goes on when it is started again. `other` stays as it is.

    Args:
        into, other: folders or URLs.
        progress: told how many files are copied, and of how many.

    Returns:
        For each part that is there now, whether it is complete.

    Raises:
        DataError: they were made with something different, or `other` is no cache; or the text lacks a caption.
    """
    if not cache.is_cache(other):
        raise DataError(f"{other}: not a cache; expected a folder that `stdit data encode` made")
    wanted = []
    for part in cache.PARTS:
        about = cache.read_metadata(other, part)
        if about is not None:
            cache.lock_metadata(into, part, about)
            missing = sorted(cache.list_shards(other, part) - cache.list_shards(into, part))
            wanted += [f"{part}/{cache.shard_name(number)}" for number in missing]
    for done, name in enumerate(wanted):
        progress(done, len(wanted))
        with files.open_binary(files.join(other, name)) as file:
            files.write_bytes(files.join(into, name), file.read())
    progress(len(wanted), len(wanted))
    complete = {part: _finish(into, part) for part in cache.PARTS if cache.read_metadata(into, part) is not None}
    if complete.get("video") and complete.get("text"):
        LatentDataset(into)
    return complete


def _finish(url: str, part: cache.Part) -> bool:
    about = cache.read_metadata(url, part) or {}
    if files.exists(files.join(url, f"{part}/{cache.INDEX}")):
        return True
    if len(cache.list_shards(url, part)) < about["shards"]:
        return False
    cache.write_index(url, part, about["shards"])
    return True
