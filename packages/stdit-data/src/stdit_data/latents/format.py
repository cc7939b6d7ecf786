"""The files of a cache of latents and text embeddings: layout, writing, reading.

    CACHE/video/about.json          metadata: VAE, transform, manifest, and all else that must be the same for all clips
    CACHE/video/00000.safetensors   a shard: moments [2C, T, H, W] of many clips, and in its header a row for each
    CACHE/video/index.parquet       the rows of all shards, written after the last shard
    CACHE/text/...                  the same for captions: text-encoder states [L, D] without padding

A shard holds its own rows and is written atomically. The two parts are independent and may be made on different
machines.

C latent channels, T frames, H W latent height and width, L text tokens, D width of the text encoder.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from stdit_data.errors import DataError
from stdit_data.storage import atomic, files, listing, readers, urls

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # version of this layout
METADATA_FILE, INDEX = "about.json", "index.parquet"
Part = Literal["video", "text"]
PARTS: tuple[Part, ...] = ("video", "text")
THREADS = 16  # for reading the headers of shards
COMPONENT_LABELS = {"vae": "VAE", "text_encoder": "text encoder"}

_ROWS: dict[Part, pa.Schema] = {
    "video": pa.schema(
        [
            ("shard", pa.int32()),
            ("key", pa.string()),  # the tensor's name in its shard
            ("sample", pa.int64()),  # index in the data set that was encoded
            ("variant", pa.int32()),  # the epoch whose random draws it was encoded with
            ("source", pa.string()),
            ("caption", pa.string()),
            ("start", pa.float64()),  # seconds from the source's first frame to the clip's first and last
            ("end", pa.float64()),
            ("fps", pa.float64()),  # as sampled
            ("frames", pa.int32()),  # of the clip in pixels
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("group", pa.string()),  # whose clips are all trained on or all held out
            ("weight", pa.float64()),  # how often an epoch shows the clip
            ("reason", pa.string()),  # why the clip could not be read and has no tensor
        ]
    ),
    "text": pa.schema(
        [
            ("shard", pa.int32()),
            ("key", pa.string()),
            ("caption", pa.string()),  # as in the manifest
            ("text", pa.string()),  # cleaned, as encoded; captions with the same text share a tensor
            ("tokens", pa.int32()),
        ]
    ),
}


@dataclass(slots=True)
class Shard:
    """The content of a shard."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # by key
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the index, without column `shard`


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"{number:05d}.safetensors"


def is_cache(url: str) -> bool:
    """Return whether a folder or URL holds a part of a cache."""
    return any(files.exists(urls.join(url, f"{part}/{METADATA_FILE}")) for part in PARTS)


def check_place(url: str) -> None:
    """Check that a folder or URL is one for a cache: it is one, is empty, or does not exist.

    Raises:
        DataError: it holds other files.
    """
    others = [name for name in listing.names(url) if name not in PARTS and not name.startswith(".")]
    if others and not is_cache(url):
        raise DataError(f"{url} holds other files, such as {min(others)}: name a new folder for the cache")


def read_metadata(cache: str, part: Part) -> dict[str, Any] | None:
    """Read the metadata of a part: what it was encoded with. None if the part does not exist.

    Raises:
        DataError: the file is of another version of the format, or not JSON.
    """
    url = urls.join(cache, f"{part}/{METADATA_FILE}")
    if not files.exists(url):
        return None
    try:
        metadata: dict[str, Any] = json.loads(files.read_text(url))
        version = metadata["format"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise DataError(f"{url}: not written by `stdit data encode`; encode again into another folder") from None
    if version != FORMAT:
        raise DataError(f"{url}: format {version}, this version reads {FORMAT}; encode again")
    return metadata


def lock_metadata(cache: str, part: Part, metadata: Mapping[str, Any]) -> None:
    """Write the metadata of a part unless there is some, and check that what is there is the same.

    Raises:
        DataError: the part was encoded with something else; the message names it.
    """
    content = (json.dumps(metadata, indent=1) + "\n").encode()
    atomic.write_new(urls.join(cache, f"{part}/{METADATA_FILE}"), content)
    check_metadata(cache, part, metadata)


def check_metadata(cache: str, part: Part, metadata: Mapping[str, Any]) -> None:
    """Check that the metadata of a part is still what it was locked with.

    In a store, of two processes that start at the same moment both may lock a part, and the last one's is kept.

    Raises:
        DataError: the part is encoded with something else; the message names it.
    """
    fs, path = files.filesystem(urls.join(cache, f"{part}/{METADATA_FILE}"))
    fs.invalidate_cache(path)
    existing = read_metadata(cache, part)
    if existing is not None and (difference := _first_difference(existing, json.loads(json.dumps(metadata)))):
        raise DataError(f"{cache}: {difference}; encode with the same, or into another folder")


def write_shard(cache: str, part: Part, number: int, shard: Shard) -> None:
    """Write a shard, whole or not at all."""
    from safetensors.torch import save  # with torch, which a run's settings are read without

    data = save(shard.tensors, metadata={"rows": json.dumps(shard.rows, ensure_ascii=False)})
    atomic.write_bytes(urls.join(cache, f"{part}/{shard_name(number)}"), data)


def list_shards(cache: str, part: Part) -> set[int]:
    """Return the numbers of the shards that exist."""
    names = listing.names(urls.join(cache, part))
    return {int(match[1]) for name in names if (match := re.fullmatch(r"(\d+)\.safetensors", name))}


def remove_partials(cache: str, part: Part, numbers: Iterable[int]) -> None:
    """Remove unfinished files of shards that killed processes have left."""
    wanted = {shard_name(number) for number in numbers}
    fs, folder = files.filesystem(urls.join(cache, part))
    for name in listing.names(urls.join(cache, part)):
        match = re.fullmatch(r"\.(.+)\.\d+\.part", name)
        if match and match[1] in wanted:
            with suppress(FileNotFoundError):  # another process was first
                fs.rm_file(f"{folder.rstrip('/')}/{name}")


def read_rows(cache: str, part: Part, number: int) -> list[dict[str, Any]]:
    """Read the rows of one shard from its header.

    Raises:
        DataError: the file is missing or damaged.
    """
    url = urls.join(cache, f"{part}/{shard_name(number)}")
    try:
        with files.open_binary(url) as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return [{**row, "shard": number} for row in json.loads(header["__metadata__"]["rows"])]
    except (ValueError, KeyError, OverflowError, MemoryError):
        raise DataError(f"{url}: damaged; remove it and encode again, the rest is kept") from None


def write_index(cache: str, part: Part, shards: int) -> None:
    """Collect the rows of all shards into `index.parquet`."""
    found = readers.map_in_threads(lambda number: read_rows(cache, part, number), range(shards), THREADS)
    rows = [row for some in found for row in some]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, _ROWS[part]), buffer, compression="zstd")
    atomic.write_bytes(urls.join(cache, f"{part}/{INDEX}"), buffer.getvalue())


def read_index(cache: str, part: Part) -> pa.Table:
    """Read the index of a finished part.

    Raises:
        DataError: the part does not exist, is not finished, or its index is damaged.
    """
    metadata = read_metadata(cache, part)
    if metadata is None:
        raise DataError(f"{cache}: no {part} part; make it with `stdit data encode`")
    url = urls.join(cache, f"{part}/{INDEX}")
    if not files.exists(url):
        done = len(list_shards(cache, part))
        raise DataError(
            f"{cache}: only {done} of {metadata['shards']} {part} shards exist; run the same `stdit data encode` again"
        )
    with files.open_binary(url) as file:
        try:
            return pq.read_table(io.BytesIO(file.read()), schema=_ROWS[part])
        except pa.ArrowInvalid:
            raise DataError(f"{url}: damaged; remove it and run the same `stdit data encode` again") from None


def _first_difference(existing: Mapping[str, Any], requested: Mapping[str, Any]) -> str | None:
    """Describe the first difference of two sets of metadata.

    A `source` is only the name of what a hash identifies, so sources may differ.
    """
    for key in [*existing, *(key for key in requested if key not in existing)]:
        old, new = existing.get(key), requested.get(key)
        if old == new or key == "source":
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            if old.get("hash") != new.get("hash"):
                names = " and ".join(f"{value.get('source')} (hash {value.get('hash')})" for value in (old, new))
                return f"made with another {COMPONENT_LABELS.get(key, key)} than requested: {names}"
            if inner := _first_difference(old, new):
                return f"{COMPONENT_LABELS.get(key, key)} {inner}"
            continue
        return f"{key} is {json.dumps(old)} there, {json.dumps(new)} is requested"
    return None
