"""Compute a number that tells one list of clips from another."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from stdit_data import urls
from stdit_data.manifests.entries import Entries

SEGMENT = ("start", "end", "start_frame", "end_frame")
PLAIN = r"^[ -&(-\[\]-~]*$"  # what Python writes between quotes as it is: ASCII without ' and \


def clips_identity(folder: str, entries: Entries) -> int:
    """Compute a number of 32 bits that changes when other clips are listed, or the same in another order.

    Paths are relative to their common folder, so that a data set can be moved between stops, and captions don't count,
    so that they can be corrected. Saved runs hold this number: it is the CRC-32 of one text for each clip, `(path,
    [names of its archives], Cut(segment))`, as Python writes these.
    """
    if len(entries) == 1:
        head, *archives = urls.layers(urls.join(folder, entries[0].path))
        segments = next(iter(_segments(entries.blocks(["path", *SEGMENT]))))
        return zlib.crc32(_line(PurePosixPath(head).name, archives, segments[0].as_py()))
    # Character by character, since URLs are not paths; then back to a whole folder.
    bounds = chain.from_iterable(_bounds(folder, block["path"]) for block in entries.blocks(["path"]))
    shared = len(os.path.commonprefix(list(bounds)).rpartition("/")[0])  # noqa: RUF071
    crc = 0
    for block, segments in zip(entries.blocks(["path"]), _segments(entries.blocks(["path", *SEGMENT])), strict=True):
        heads = _plain_heads(folder, block["path"])
        if heads is not None and heads[0][shared:].isascii() and not set(heads[0][shared:]) & set("'\\"):
            crc = zlib.crc32(_joined(*heads, shared, segments), crc)
            continue
        for path, segment in zip(block["path"].to_pylist(), segments.to_pylist(), strict=True):
            head, *archives = urls.layers(urls.join(folder, _text(path)))
            crc = zlib.crc32(_line(head[shared:].lstrip("/"), archives, segment), crc)
    return crc


def _line(path: str, archives: list[str], segment: str) -> bytes:
    return f"({path!r}, {[PurePosixPath(layer).name for layer in archives]!r}, {segment})".encode()


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _plain_heads(folder: str, paths: pa.Array) -> tuple[str, pa.Array, pa.Array] | None:
    """Return what relative paths begin with, which paths are not relative, and all paths; None if any is unusual."""
    plain = pc.and_not(pc.match_substring_regex(paths, PLAIN), pc.match_substring(paths, "::"))
    if len(urls.layers(folder)) > 1 or not pc.all(plain).as_py():
        return None
    own = pc.match_substring(paths, "://")
    if urls.join(folder, "/") == "/":
        own = pc.or_(own, pc.starts_with(paths, "/"))
    return urls.join(folder, ""), own, paths.cast(pa.large_string())


def _bounds(folder: str, paths: pa.Array) -> list[str]:
    """Return the first and last head of URLs in the alphabet, between which their common prefix lies."""
    heads = _plain_heads(folder, paths)
    if heads is None:
        found = [urls.layers(urls.join(folder, _text(path)))[0] for path in paths.to_pylist()]
        return [min(found), max(found)]
    before, own, texts = heads
    bounds = []
    for prefix, rows in (("", texts.filter(own)), (before, texts.filter(pc.invert(own)))):
        if len(rows):
            ends = pc.min_max(rows)
            bounds += [prefix + ends["min"].as_py(), prefix + ends["max"].as_py()]
    return bounds


def _joined(before: str, own: pa.Array, texts: pa.Array, shared: int, segments: pa.Array) -> memoryview:
    """Return the texts of a block of clips, one after the other."""
    absolute = pc.utf8_slice_codeunits(texts, start=shared)
    if shared < len(before):
        relative = pc.binary_join_element_wise(pa.scalar(before[shared:], pa.large_string()), texts, _literal(""))
    else:
        relative = pc.utf8_slice_codeunits(texts, start=shared - len(before))
    paths = pc.utf8_ltrim(pc.if_else(own, absolute, relative), characters="/")
    pieces = [_literal("('"), paths, _literal("', [], "), segments, _literal(")")]
    joined = pc.binary_join_element_wise(*pieces, _literal(""))
    return memoryview(joined.buffers()[2])[: pc.sum(pc.binary_length(joined)).as_py()]


def _segments(blocks: Iterator[pa.RecordBatch]) -> Iterator[pa.Array]:
    """Yield the segments of blocks of entries, written as objects of the class that was named Cut."""
    for block in blocks:
        texts: list[pa.Array] = []
        for name in SEGMENT:
            values = block[name] if name in block.schema.names else pa.nulls(len(block), pa.int64())
            if pa.types.is_floating(values.type):
                values = pa.array([repr(value) for value in values.to_pylist()], pa.large_string())
            else:
                values = values.cast(pa.large_string()).fill_null("None")
            texts += [_literal(f"{'Cut(' if not texts else ', '}{name}="), values]
        yield pc.binary_join_element_wise(*texts, _literal(")"), _literal(""))


def _literal(text: str) -> pa.Scalar:
    return pa.scalar(text, pa.large_string())
