"""Compute a number that tells one list of clips from another."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import PurePosixPath
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stdit_data.manifests.arrays import floats, text_scalar
from stdit_data.manifests.entries import Entries
from stdit_data.storage import urls

SEGMENT = ("start", "end", "start_frame", "end_frame")
# Bytes that Python writes between quotes as they are: ASCII without ' and \.
PLAIN = np.array([32 <= byte < 127 and byte not in b"'\\" for byte in range(256)])
Piece: TypeAlias = str | pa.Array  # of a text for each clip: the same for all, or a column


def clips_identity(folder: str, entries: Entries) -> int:
    """Compute a number of 32 bits that changes when other clips are listed, or the same in another order.

    Paths are relative to their common folder, so that a data set can be moved between stops, and captions don't count,
    so that they can be corrected. Saved runs hold this number: it is the CRC-32 of one text for each clip, `(path,
    [names of its archives], Cut(segment))`, as Python writes these.
    """
    if len(entries) == 1:
        head, *archives = urls.layers(urls.join(folder, entries[0].path))
        segment = next(_rows(_segments(next(entries.blocks(["path", *SEGMENT])))))
        return zlib.crc32(_line(PurePosixPath(head).name, archives, segment))
    # Character by character, since URLs are not paths; then back to a whole folder.
    bounds = chain.from_iterable(_bounds(folder, block["path"]) for block in entries.blocks(["path"]))
    shared = len(os.path.commonprefix(list(bounds)).rpartition("/")[0])  # noqa: RUF071
    crc = 0
    for block in entries.blocks(["path", *SEGMENT]):
        heads, segments = _plain_heads(folder, block["path"]), _segments(block)
        if heads is not None and heads.before[shared:].isascii() and not set(heads.before[shared:]) & set("'\\"):
            crc = zlib.crc32(_text_of(heads, shared, segments), crc)
            continue
        for path, segment in zip(block["path"].to_pylist(), _rows(segments), strict=False):
            head, *archives = urls.layers(urls.join(folder, _text(path)))
            crc = zlib.crc32(_line(head[shared:].lstrip("/"), archives, segment), crc)
    return crc


def _line(path: str, archives: list[str], segment: str) -> bytes:
    return f"({path!r}, {[PurePosixPath(layer).name for layer in archives]!r}, {segment})".encode()


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


class Heads(NamedTuple):
    """The first layers of the URLs of a block of clips, none of them unusual: what Python writes as they are."""

    before: str  # what relative paths begin with
    own: pa.Array | None  # which are not relative; None if all are
    paths: pa.Array


def _plain_heads(folder: str, paths: pa.Array) -> Heads | None:
    """Return the heads of a block; None if any is unusual."""
    characters = _characters(paths)
    if len(urls.layers(folder)) > 1 or not PLAIN[characters].all():
        return None
    own = None
    if (characters == ord(":")).any():
        if pc.any(pc.match_substring(paths, "::")).as_py():
            return None
        own = pc.match_substring(paths, "://")
    if urls.join(folder, "/") == "/":
        absolute = pc.starts_with(paths, "/")
        own = absolute if own is None else pc.or_(own, absolute)
    return Heads(urls.join(folder, ""), own if own is not None and pc.any(own).as_py() else None, paths)


def _characters(texts: pa.Array) -> NDArray[np.uint8]:
    """Return the bytes of all texts of a block."""
    _, offsets, data = texts.buffers()
    first, last = np.frombuffer(offsets, np.int64)[[texts.offset, texts.offset + len(texts)]]
    return np.frombuffer(data, np.uint8)[first:last] if data is not None else np.zeros(0, np.uint8)


def _bounds(folder: str, paths: pa.Array) -> list[str]:
    """Return the first and last head of URLs in the alphabet, between which their common prefix lies."""
    heads = _plain_heads(folder, paths)
    if heads is None:
        found = [urls.layers(urls.join(folder, _text(path)))[0] for path in paths.to_pylist()]
        return [min(found), max(found)]
    parts = [(heads.before, paths)]
    if heads.own is not None:
        parts = [("", paths.filter(heads.own)), (heads.before, paths.filter(pc.invert(heads.own)))]
    bounds = []
    for prefix, rows in parts:
        if len(rows):
            ends = pc.min_max(rows)
            bounds += [prefix + ends["min"].as_py().decode(), prefix + ends["max"].as_py().decode()]
    return bounds


def _text_of(heads: Heads, shared: int, segments: list[Piece]) -> memoryview:
    """Return the texts of a block of clips, one after the other."""
    before, paths = heads.before, heads.paths.cast(pa.large_string())
    if shared < len(before):
        relative = _joined([before[shared:], paths])
    else:
        relative = pc.utf8_slice_codeunits(paths, start=shared - len(before))
    if heads.own is not None:
        relative = pc.if_else(heads.own, pc.utf8_slice_codeunits(paths, start=shared), relative)
    joined = _joined(["('", pc.ascii_ltrim(relative, characters="/"), "', [], ", *segments, ")"])
    _, offsets, data = joined.buffers()
    return memoryview(data)[: np.frombuffer(offsets, np.int64)[len(joined)]]


def _segments(block: pa.RecordBatch) -> list[Piece]:
    """Return the segments of a block of entries, written as objects of the class that was named Cut, in pieces."""
    pieces: list[Piece] = []
    for name in SEGMENT:
        pieces.append(f"{'Cut(' if not pieces else ', '}{name}=")
        if name not in block.schema.names:
            pieces.append("None")
        elif pa.types.is_floating(block[name].type):
            pieces.append(_float_texts(block[name]))
        else:
            pieces.append(block[name].cast(pa.large_string()).fill_null(text_scalar("None")))
    return [*pieces, ")"]


def _float_texts(array: pa.Array) -> pa.Array:
    """Return numbers as Python writes them; Arrow does so too, but for whole, tiny and huge ones."""
    size = np.abs(floats(array))
    if not (np.isnan(size) | (size == 0) | ((size >= 1e-4) & (size < 1e9))).all():
        return pa.array([repr(value) for value in array.to_pylist()], pa.large_string())
    texts = array.cast(pa.large_string())
    whole = pc.invert(pc.match_substring(texts, "."))
    return pc.if_else(whole, _joined([texts, ".0"]), texts).fill_null(text_scalar("None"))


def _rows(pieces: list[Piece]) -> Iterator[str]:
    """Yield what `_joined` does, row by row."""
    columns = (repeat(piece) if isinstance(piece, str) else piece.to_pylist() for piece in pieces)
    return map("".join, zip(*columns, strict=False))


def _joined(pieces: list[Piece]) -> pa.Array:
    """Join texts that all rows have in common and columns of texts, row by row."""
    merged: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        else:
            merged.append(piece)
    scalars = [text_scalar(piece) if isinstance(piece, str) else piece for piece in merged]
    return pc.binary_join_element_wise(*scalars, text_scalar(""))
