"""Read and write manifests as Arrow tables: all columns are kept, and Parquet is read one shard at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stdit_data.errors import DataError
from stdit_data.manifests.columns import column_name
from stdit_data.manifests.entries import ARROW, COLUMNS, KINDS
from stdit_data.manifests.format import DELIMITERS, path_array, read_csv, read_manifest
from stdit_data.manifests.rows import json_rows
from stdit_data.storage import atomic, files, urls
from stdit_data.video.segments import Segment

ROW_GROUP = 8192  # rows
COMPRESSION = "zstd"
TEXTS = ("path", "caption", "sha256")
STANDARD = {name: ARROW[KINDS.get(name, str)] for name in COLUMNS}


@dataclass(frozen=True)
class Rows:
    """The rows of a manifest.

    Attributes:
        url: where they are from.
        schema: their columns; those of a manifest have their standard types. Paths are bytes where one is not UTF-8.
        count: how many there are.
        shards: yields them in order as tables of the given number of rows; the last may be shorter.
    """

    url: str
    schema: pa.Schema
    count: int
    shards: Callable[[int], Iterator[pa.Table]]


def open_rows(url: str, *, root: str | None = None) -> Rows:
    """Open a manifest or a folder of videos and images. Paths become absolute.

    Parquet is streamed; CSV, JSON lines and folders are read whole.

    Raises:
        DataError: nothing there, or a wrong column or value.
    """
    if urls.suffix(url) == ".parquet":
        return _open_parquet(url, root or urls.parent(url))
    manifest = read_manifest(url, root=root)
    dicts = [asdict(entry) for entry in manifest.entries]
    used = [name for name in COLUMNS if name != "path" and any(row[name] is not None for row in dicts)]
    paths = _absolute([row["path"] for row in dicts], manifest.folder)
    columns = {name: pa.array([row[name] for row in dicts], STANDARD[name]) for name in used}
    table = pa.table({"path": path_array(paths), **columns})
    for name, values in _further_columns(url).items():
        table = table.append_column(name, _numbers_or_text(values))

    def shards(rows: int) -> Iterator[pa.Table]:
        for start in range(0, len(table), rows):
            yield table.slice(start, rows)

    return Rows(url, table.schema, len(table), shards)


def write_rows(url: str, tables: Iterator[pa.Table], schema: pa.Schema) -> int:
    """Write tables as one Parquet file, whole or not at all, in row groups of `ROW_GROUP`.

    Returns:
        Rows written.
    """
    waiting: list[pa.Table] = []
    held = written = 0
    with atomic.open_write(url) as file, pq.ParquetWriter(file, schema, compression=COMPRESSION) as writer:
        for table in tables:
            waiting.append(table)
            held += len(table)
            written += len(table)
            if held >= ROW_GROUP:
                joined = pa.concat_tables(waiting).combine_chunks()
                whole = held - held % ROW_GROUP
                writer.write_table(joined.slice(0, whole).cast(schema), row_group_size=ROW_GROUP)
                waiting, held = [joined.slice(whole)], held - whole
        if held or not written:
            joined = pa.concat_tables(waiting) if waiting else schema.empty_table()
            writer.write_table(joined.combine_chunks().cast(schema), row_group_size=ROW_GROUP)
    return written


def with_columns(schema: pa.Schema, columns: dict[str, pa.DataType]) -> pa.Schema:
    """Return the schema with these columns set, new ones at the end."""
    for name, kind in columns.items():
        place = schema.get_field_index(name)
        field = pa.field(name, kind)
        schema = schema.append(field) if place < 0 else schema.set(place, field)
    return schema


def to_dicts(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a table, their paths as text."""
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        if isinstance(row.get("path"), bytes):
            row["path"] = os.fsdecode(row["path"])
    return rows


def from_dicts(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Make a table of rows, their paths as bytes if the schema has them so."""
    if schema.field("path").type == pa.binary():
        rows = [{**row, "path": os.fsencode(row["path"])} for row in rows]
    return pa.Table.from_pylist(list(rows), schema)


def segment_of(row: dict[str, Any]) -> Segment:
    """Return the segment of its file that a row names."""
    return Segment(*(row.get(name) for name in ("start", "end", "start_frame", "end_frame")))


def _open_parquet(url: str, folder: str) -> Rows:
    if not files.exists(url):
        raise DataError(f"{url}: no such manifest")
    with files.open_binary(url) as file:
        try:
            parquet = pq.ParquetFile(file)
            found, count = parquet.schema_arrow, parquet.metadata.num_rows
        except pa.ArrowInvalid as error:
            raise DataError(f"{url}: not Parquet ({str(error).splitlines()[0]})") from None
    names = [column_name(name) for name in found.names]
    if "path" not in names:
        raise DataError(f"{url}: no column 'path'; found {', '.join(found.names) or 'none'}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{url}: column {twice!r} occurs twice")
    if count == 0:
        raise DataError(f"{url}: no entries; expected at least one line with a path")
    kinds = {name: _plain(kind) for name, kind in zip(names, found.types, strict=True)}
    as_bytes = pa.types.is_binary(kinds["path"]) or not urls.is_utf8(folder)
    for name in TEXTS:
        if name in kinds and not (_is_text(kinds[name]) or (name == "path" and as_bytes)):
            raise DataError(f"{url}: column {name!r} is of type {kinds[name]}; expected text")
    kinds |= {name: kind for name, kind in STANDARD.items() if name in kinds}
    kinds["path"] = pa.binary() if as_bytes else pa.string()
    schema = pa.schema(list(kinds.items()))

    def shards(rows: int) -> Iterator[pa.Table]:
        held: list[pa.Table] = []
        with files.open_binary(url) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=rows):
                try:
                    table = pa.Table.from_batches([batch]).rename_columns(names).cast(schema)
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                    raise DataError(f"{url}: {str(error).splitlines()[0]}") from None
                held.append(_with_absolute_paths(table, folder))
                while sum(map(len, held)) >= rows:  # a batch ends where a row group does
                    joined = pa.concat_tables(held)
                    yield joined.slice(0, rows)
                    held = [joined.slice(rows)]
        if sum(map(len, held)):
            yield pa.concat_tables(held)

    return Rows(url, schema, count, shards)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _with_absolute_paths(table: pa.Table, folder: str) -> pa.Table:
    rows = to_dicts(table.select(["path"]))
    paths = _absolute([row["path"] for row in rows], folder)
    column = from_dicts([{"path": path} for path in paths], pa.schema([table.schema.field("path")]))["path"]
    return table.set_column(table.schema.get_field_index("path"), "path", column)


def _absolute(paths: Iterable[str], folder: str) -> list[str]:
    full = []
    for path in paths:
        if not path:
            raise DataError(f"{folder}: row without a path; expected the video's path or URL in column 'path'")
        full.append(path if _is_absolute(path) else urls.canonical(urls.join(folder, path)))
    return full


def _is_absolute(path: str) -> bool:
    return path.startswith("/") and "/.." not in path and "::" not in path


def _further_columns(url: str) -> dict[str, list[Any]]:
    """Return the columns of a CSV or JSON lines file that a manifest does not define, in the order of its entries."""
    kind = urls.suffix(url)
    if kind in DELIMITERS:
        header, *rows = [cells for _, cells in read_csv(url)]
        names = [column_name(name) for name in header]
        if "path" not in names:
            return {}  # Open-Sora 1.0's, without a header
        dicts: list[dict[str, Any]] = [dict(zip(names, cells, strict=True)) for cells in rows]
    elif kind in (".jsonl", ".ndjson"):
        dicts = [
            {column_name(name): value for name, value in row.items()} for _, row in json_rows(url, files.read_text(url))
        ]
    else:
        return {}
    names = list(dict.fromkeys(name for row in dicts for name in row))
    return {name: [row.get(name) for row in dicts] for name in names if name not in COLUMNS}


def _numbers_or_text(values: list[Any]) -> pa.Array:
    """Return numbers if all values are numbers, otherwise text; empty cells are null."""
    values = [None if value in ("", None) else value for value in values]
    try:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    except (TypeError, ValueError):
        text = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        return pa.array(text, pa.string())
