"""The entries of a manifest: a row each of an Arrow table, which become objects when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from stdit_data.manifests.arrays import floats, from_numpy
from stdit_data.video.segments import Segment

BLOCK = 65_536  # rows that are handled at once


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a manifest."""

    path: str  # relative to the manifest's folder, absolute, or a URL
    caption: str = ""
    start: float | None = None  # seconds from the video's first frame
    end: float | None = None  # seconds, exclusive
    start_frame: int | None = None  # the same segment in frames, at the video's average rate
    end_frame: int | None = None  # exclusive
    fps: float | None = None  # frames per second of the video
    width: int | None = None  # pixels, as displayed
    height: int | None = None
    num_frames: int | None = None  # of the whole video, not of the segment
    source: str | None = None  # origin of the clip
    licence: str | None = None
    sha256: str | None = None  # of the file, hexadecimal
    group: str | None = None  # clips of one group are all trained on or all held out
    weight: float | None = None  # how often an epoch shows the clip; 1 if not given

    @property
    def segment(self) -> Segment:
        """The part of the video that the entry names."""
        return Segment(self.start, self.end, self.start_frame, self.end_frame)


COLUMNS = tuple(field.name for field in fields(Entry))
KINDS: dict[str, type] = {
    "start": float,
    "end": float,
    "start_frame": int,
    "end_frame": int,
    "fps": float,
    "width": int,
    "height": int,
    "num_frames": int,
    "weight": float,
}
ARROW = {float: pa.float64(), int: pa.int64(), str: pa.string()}  # in files
# File names need not be UTF-8; and a column may exceed the 2 GiB of Arrow's smaller types.
SCHEMA = pa.schema(
    [
        (name, {float: pa.float64(), int: pa.int64()}.get(KINDS.get(name, str), pa.large_string()))
        for name in COLUMNS
        if name != "path"
    ]
).insert(0, pa.field("path", pa.large_binary()))


class Entries(Sequence[Entry]):
    """Some rows of a table, in any order; the table may be mapped from a file and larger than memory.

    Args:
        table: has columns of `SCHEMA`, `path` at least; those of no entry are missing.
        rows: the rows; by default all in order.
    """

    def __init__(self, table: pa.Table, rows: NDArray[np.int64] | None = None) -> None:
        self.table, self._rows = table, rows

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Entries:
        """Make a table of entries."""
        batches = []
        entries = list(entries)
        for start in range(0, len(entries), BLOCK):
            part = entries[start : start + BLOCK]
            batches.append(to_batch({name: [getattr(entry, name) for entry in part] for name in COLUMNS}))
        table = pa.Table.from_batches(batches, SCHEMA)
        used = [name for name in COLUMNS if name == "path" or table[name].null_count < len(table)]
        return cls(table.select(used))

    def __len__(self) -> int:
        return len(self.table) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Entries: ...
    def __getitem__(self, index: int | slice) -> Entry | Entries:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return Entry(
            **{name: value for name in self.table.column_names if (value := self.value(name, index)) is not None}
        )

    def __iter__(self) -> Iterator[Entry]:
        for block in self.blocks(self.table.column_names):
            columns = {name: block[name].to_pylist() for name in block.schema.names}
            columns["path"] = [_text(path) for path in columns["path"]]
            if "caption" in columns:
                columns["caption"] = [caption or "" for caption in columns["caption"]]
            for values in zip(*columns.values(), strict=True):
                yield Entry(**dict(zip(columns, values, strict=True)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Entry.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def take(self, indices: ArrayLike) -> Entries:
        """Select entries; the table is shared."""
        rows = np.asarray(indices, dtype=np.int64)
        return Entries(self.table, rows if self._rows is None else self._rows[rows])

    def value(self, name: str, index: int) -> Any:
        """Return one value of one entry; None if it has none."""
        if name not in self._columns:
            return None
        if not -len(self) <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        index %= len(self)
        value = self._columns[name][index if self._rows is None else int(self._rows[index])].as_py()
        return _text(value) if name == "path" else value

    def paths(self) -> Iterator[str]:
        """Yield all paths in order, as `Entry.path`."""
        for block in self.blocks(["path"]):
            yield from map(_text, block["path"].to_pylist())

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Return a column of numbers, with NaN for missing ones; whole numbers are exact up to 2**53."""
        if name not in self._columns:
            return np.full(len(self), np.nan)
        found, start = np.empty(len(self)), 0
        for block in self.blocks([name]):
            found[start : start + len(block)] = floats(block[name])
            start += len(block)
        return found

    def blocks(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield columns that the table has, a block of entries at a time."""
        table = self.table.select([name for name in names if name in self._columns])
        if self._rows is None:
            yield from table.to_batches(max_chunksize=BLOCK)
        elif (np.diff(self._rows) < 0).any():
            yield from table.take(from_numpy(self._rows)).to_batches(max_chunksize=BLOCK)
        else:  # block by block, since `take` would copy whole columns first
            start = 0
            for batch in table.to_batches(max_chunksize=BLOCK):
                first, stop = np.searchsorted(self._rows, (start, start + len(batch)))
                if first < stop:
                    yield batch.take(from_numpy(self._rows[first:stop] - start))
                start += len(batch)

    def replaced(self, columns: dict[str, NDArray[np.float64]]) -> Entries:
        """Return the entries with other columns of numbers, NaN for missing ones."""
        table = self.table if self._rows is None else self.table.take(from_numpy(self._rows))
        for name, values in columns.items():
            field = SCHEMA.field(name)
            column = pa.array(values, mask=np.isnan(values)).cast(field.type)
            place = table.schema.get_field_index(name)
            table = table.append_column(field, column) if place < 0 else table.set_column(place, field, column)
        return Entries(table)

    @cached_property
    def _columns(self) -> dict[str, pa.ChunkedArray]:
        return {name: self.table[name] for name in self.table.column_names}


def to_batch(columns: dict[str, list[Any]]) -> pa.RecordBatch:
    """Make a batch of checked values, by column; an empty caption is a missing one.

    Raises:
        UnicodeEncodeError: a caption or origin is not Unicode.
        OverflowError, ArrowInvalid: a whole number has more than 63 bits.
    """
    columns["path"] = [path.encode("utf-8", "surrogateescape") for path in columns["path"]]
    if "caption" in columns:
        columns["caption"] = [caption or None for caption in columns["caption"]]
    arrays = [pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
