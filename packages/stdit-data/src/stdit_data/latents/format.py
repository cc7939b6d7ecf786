"""What a cache of latents and text embeddings looks like on disk, and how its files are written and found.

    CACHE/video/about.json          VAE, transform, manifest: whatever must be the same for all of it
    CACHE/video/00000.safetensors   moments [2C, T, H, W] of many clips, and in its header a row about each
    CACHE/video/index.parquet       the rows of all shards; written when the last shard is there
    CACHE/text/...                  the same for captions: text-encoder states [L, D] without padding

A shard carries its own rows, so that it is there whole or not at all: it is written beside its place and renamed. The
two parts stand alone; they may be made on different machines.

C latent channels, T frames, H W latent height and width, L text tokens, D width of the text encoder.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save
from torch import Tensor

from stdit_data import files
from stdit_data.errors import DataError

FORMAT = 1
METADATA_FILE, INDEX = "about.json", "index.parquet"
Part = Literal["video", "text"]
PARTS: tuple[Part, ...] = ("video", "text")
THREADS = 16  # that read headers
COMPONENT_LABELS = {"vae": "VAE", "text_encoder": "text encoder"}

_ROWS: dict[Part, pa.Schema] = {
    "video": pa.schema(
        [
            ("shard", pa.int32()),
            ("key", pa.string()),  # the tensor's name in its shard
            ("sample", pa.int64()),  # position in the dataset that was encoded
            ("variant", pa.int32()),  # the epoch whose random draws it has
            ("source", pa.string()),
            ("caption", pa.string()),
            ("start", pa.float64()),  # seconds from the source's first frame to the clip's first and last
            ("end", pa.float64()),
            ("fps", pa.float64()),  # as sampled
            ("frames", pa.int32()),  # of the clip in pixels
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("weight", pa.float64()),  # how often an epoch shows it
            ("reason", pa.string()),  # why there is no tensor, for a clip that could not be read
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
    """One file: tensors by name, and a row of the index for each (`shard` is filled in when they are read)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def shard_name(number: int) -> str:
    return f"{number:05d}.safetensors"


def is_cache(url: str) -> bool:
    """Whether a folder holds a part of a cache."""
    return any(files.exists(files.join(url, f"{part}/{METADATA_FILE}")) for part in PARTS)


def read_metadata(cache: str, part: Part) -> dict[str, Any] | None:
    """What a part was made with; None without that part.

    Raises:
        DataError: it is of another version of the format, or no JSON.
    """
    url = files.join(cache, f"{part}/{METADATA_FILE}")
    if not files.exists(url):
        return None
    try:
        about = json.loads(files.read_text(url))
        version = about["format"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise DataError(f"{url}: not what `stdit data encode` writes; encode anew into another folder") from None
    if version != FORMAT:
        raise DataError(f"{url}: format {version}, this version reads {FORMAT}; encode anew")
    return about


def lock_metadata(cache: str, part: Part, about: Mapping[str, Any]) -> None:
    """Writes `about.json`, or, where there is one, checks that it says the same.

    Raises:
        DataError: the part was made with something else; the message names it.
    """
    there = read_metadata(cache, part)
    if there is None:
        files.write_bytes(files.join(cache, f"{part}/{METADATA_FILE}"), (json.dumps(about, indent=1) + "\n").encode())
        there = read_metadata(cache, part) or {}
    if difference := first_difference(there, json.loads(json.dumps(about))):
        raise DataError(f"{cache}: {difference}; go on with the same, or give another folder")


def first_difference(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """What two `about` say differently, in words; sources are names for what the hashes tell, so they may differ."""
    for key in [*there, *(key for key in asked if key not in there)]:
        mine, yours = there.get(key), asked.get(key)
        if mine == yours or key == "source":
            continue
        if isinstance(mine, dict) and isinstance(yours, dict):
            if mine.get("hash") != yours.get("hash"):
                names = " and ".join(f"{who.get('source')} (hash {who.get('hash')})" for who in (mine, yours))
                return f"made with another {COMPONENT_LABELS.get(key, key)} than asked for: {names}"
            if inner := first_difference(mine, yours):
                return f"{COMPONENT_LABELS.get(key, key)} {inner}"
            continue
        return f"{key} is {json.dumps(mine)} there and {json.dumps(yours)} is asked for"
    return None


def write_shard(cache: str, part: Part, number: int, shard: Shard) -> None:
    """Writes a shard, whole or not at all."""
    data = save(shard.tensors, metadata={"rows": json.dumps(shard.rows, ensure_ascii=False)})
    files.write_bytes(files.join(cache, f"{part}/{shard_name(number)}"), data)


def list_shards(cache: str, part: Part) -> set[int]:
    """The shards that are there."""
    names = _names(cache, part)
    return {int(match[1]) for name in names if (match := re.fullmatch(r"(\d+)\.safetensors", name))}


def remove_partials(cache: str, part: Part, names: Iterable[str] | None = None) -> None:
    """Removes what killed processes have left: all, or what was to become `names`."""
    wanted = None if names is None else set(names)
    fs, folder = files.filesystem(files.join(cache, part))
    for name in _names(cache, part):
        match = re.fullmatch(r"\.(.+)\.\d+\.part", name)
        if match and (wanted is None or match[1] in wanted):
            fs.rm_file(f"{folder.rstrip('/')}/{name}")


def _names(cache: str, part: Part) -> list[str]:
    fs, folder = files.filesystem(files.join(cache, part))
    fs.invalidate_cache(folder)
    if not fs.isdir(folder):
        return []
    return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False)]


def read_rows(cache: str, part: Part, number: int) -> list[dict[str, Any]]:
    """The rows of one shard, from its header.

    Raises:
        DataError: no safetensors file of ours.
    """
    url = files.join(cache, f"{part}/{shard_name(number)}")
    try:
        with files.open_binary(url) as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return [{**row, "shard": number} for row in json.loads(header["__metadata__"]["rows"])]
    except (ValueError, KeyError, OverflowError, MemoryError):
        raise DataError(f"{url}: damaged; remove it and encode again, the rest is kept") from None


def write_index(cache: str, part: Part, shards: int) -> None:
    """Collects the rows of all shards into `index.parquet`."""
    with ThreadPoolExecutor(THREADS) as pool:
        rows = [row for some in pool.map(lambda n: read_rows(cache, part, n), range(shards)) for row in some]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, _ROWS[part]), buffer, compression="zstd")
    files.write_bytes(files.join(cache, f"{part}/{INDEX}"), buffer.getvalue())


def read_index(cache: str, part: Part) -> pa.Table:
    """The rows of a finished part.

    Raises:
        DataError: there is no such part, or it isn't finished.
    """
    about = read_metadata(cache, part)
    if about is None:
        raise DataError(f"{cache}: no {part} part; make it with `stdit data encode`")
    url = files.join(cache, f"{part}/{INDEX}")
    if not files.exists(url):
        done = len(list_shards(cache, part))
        raise DataError(
            f"{cache}: {done} of {about['shards']} {part} shards are there; the same `stdit data encode` goes on"
        )
    with files.open_binary(url) as file:
        return pq.read_table(file, schema=_ROWS[part])
