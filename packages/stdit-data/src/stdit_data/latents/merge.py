"""Merge parts of a cache that were encoded in different places."""

from __future__ import annotations

from collections.abc import Callable

from stdit_data.errors import DataError
from stdit_data.latents import format as cache
from stdit_data.latents.dataset import LatentDataset
from stdit_data.storage import atomic, files, urls


def merge(
    into: str, other: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[cache.Part, bool]:
    """Copy the parts and shards of a cache that `other` has and `into` lacks.

    Files are copied whole, so an interrupted merge can be run again. `other` is not changed.

    Args:
        into, other: folders or URLs.
        progress: called with the number of files copied and their total.

    Returns:
        Whether each part that exists is complete.

    Raises:
        DataError: the two were made with different settings, `other` is not a cache, or the texts lack a caption.
    """
    if not cache.is_cache(other):
        raise DataError(f"{other}: not a cache; expected a folder written by `stdit data encode`")
    missing = []
    for part in cache.PARTS:
        metadata = cache.read_metadata(other, part)
        if metadata is not None:
            cache.lock_metadata(into, part, metadata)
            numbers = sorted(cache.list_shards(other, part) - cache.list_shards(into, part))
            missing += [f"{part}/{cache.shard_name(number)}" for number in numbers]
    for done, name in enumerate(missing):
        progress(done, len(missing))
        with files.open_binary(urls.join(other, name)) as file:
            atomic.write_bytes(urls.join(into, name), file.read())
    progress(len(missing), len(missing))
    complete = {part: _finish(into, part) for part in cache.PARTS if cache.read_metadata(into, part) is not None}
    if complete.get("video") and complete.get("text"):
        LatentDataset(into)  # checks that the texts have all captions
    return complete


def _finish(url: str, part: cache.Part) -> bool:
    metadata = cache.read_metadata(url, part) or {}
    if files.exists(urls.join(url, f"{part}/{cache.INDEX}")):
        return True
    if len(cache.list_shards(url, part)) < metadata["shards"]:
        return False
    cache.write_index(url, part, metadata["shards"])
    return True
