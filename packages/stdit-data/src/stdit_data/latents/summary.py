"""Describe the content of a cache, and compute the sizes of latents and text states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc

from stdit_data.errors import DataError
from stdit_data.latents import format as cache
from stdit_data.latents.format import COMPONENT_LABELS, Part
from stdit_data.storage import files, readers, urls


def moments_bytes(latent: Sequence[int], itemsize: int = 2) -> int:
    """Compute the bytes of a clip's moments, mean and log variance.

    Args:
        latent: shape of the latents: channels, frames, height, width.
        itemsize: bytes per number; 2 for bfloat16.
    """
    return 2 * math.prod(latent) * itemsize


def text_bytes(tokens: int, width: int, itemsize: int = 2) -> int:
    """Compute the bytes of a caption's states, `itemsize` bytes per number."""
    return tokens * width * itemsize


def human_bytes(size: float) -> str:
    """Format bytes with a binary unit: 1536 as 1.5 KiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def describe(url: str) -> list[tuple[str, str]]:
    """Describe a cache's metadata and content, as names and values for display.

    Raises:
        DataError: the folder or URL is not a cache.
    """
    if not cache.is_cache(url):
        raise DataError(f"{url}: not a cache; expected a folder written by `stdit data encode`")
    lines: list[tuple[str, str]] = []
    for part in cache.PARTS:
        metadata = cache.read_metadata(url, part)
        if metadata is None:
            lines.append((part, "missing"))
            continue
        shards = cache.list_shards(url, part)
        paths = [urls.join(url, f"{part}/{cache.shard_name(number)}") for number in shards]
        size = sum(readers.map_in_threads(files.size, paths, cache.THREADS))
        complete = files.exists(urls.join(url, f"{part}/{cache.INDEX}"))
        state = "complete" if complete else "not finished: run the same `stdit data encode` again"
        lines.append((part, f"{len(shards)} of {metadata['shards']} shards, {human_bytes(size)}, {state}"))
        lines += [(f"  {name}", value) for name, value in _describe_metadata(metadata)]
        if complete:
            lines += [(f"  {name}", value) for name, value in _describe_index(url, part)]
    return lines


def _describe_metadata(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for key, value in metadata.items():
        if key in ("format", "shards") or value is None:
            continue
        if key in ("vae", "text_encoder", "manifest"):
            rest = {name: inner for name, inner in value.items() if name not in ("source", "hash")}
            lines.append((COMPONENT_LABELS.get(key, key), f"{value['source']} (hash {value['hash']})"))
            lines += [(f"  {name}", _format(inner)) for name, inner in rest.items()]
        elif key == "transform":
            lines.append((key, ", ".join(f"{n} {_format(v)}" for n, v in value.items() if v not in (None, []))))
        elif key == "shapes":
            lines += [(f"clips of {name}", f"moments {'x'.join(map(str, shape))}") for name, shape in value.items()]
        else:
            lines.append((key.replace("_", " "), human_bytes(value) if key == "shard_bytes" else str(value)))
    return lines


def _describe_index(url: str, part: Part) -> list[tuple[str, str]]:
    rows = cache.read_index(url, part)
    if part == "text":
        tokens = rows["tokens"]
        spread = f"{pc.min(tokens)} to {pc.max(tokens)}, {pc.mean(tokens).as_py():.1f} on average" if len(rows) else "-"
        return [("captions", str(len(rows))), ("tokens", spread)]
    bad = rows.filter(pc.is_valid(rows["reason"]))
    lines = [("entries", f"{len(rows) - len(bad)}, of {len(pc.unique(rows['sample']))} clips")]
    if len(bad):
        first = f"{bad['source'][0]}: {bad['reason'][0]} (in {cache.shard_name(bad['shard'][0].as_py())})"
        lines.append(("unreadable", f"{len(bad)}, the first: {first}"))
    return lines


def check_readable(url: str, max_share: float) -> str | None:
    """Return a line about the entries of a finished video part that could not be read, None if all could.

    Raises:
        DataError: they are more than a share of all.
    """
    rows = cache.read_index(url, "video")
    bad = rows.filter(pc.is_valid(rows["reason"]))
    if not len(bad):
        return None
    line = f"{len(bad)} of {len(rows)} entries could not be read, the first: {bad['source'][0]}: {bad['reason'][0]}"
    if len(bad) > max_share * len(rows):
        raise DataError(
            f"{line}; write a manifest without them with `stdit data validate --write`, and encode that into another "
            "folder"
        )
    return line


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format(inner)}" for name, inner in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " ".join(_format(inner) for inner in value)
    return str(value)
