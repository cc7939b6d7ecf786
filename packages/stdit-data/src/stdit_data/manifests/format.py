"""Read and write manifests: lists of captioned clips.

A manifest is a CSV, JSON lines or Parquet file with named columns (`COLUMNS`), the header-less CSV of Open-Sora 1.0, or
a folder of videos and images with captions in `name.txt` beside them; local or at any fsspec URL.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO, RawIOBase, TextIOWrapper
from itertools import chain, islice
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from stdit_data.errors import DataError, FileError, MissingFileError
from stdit_data.manifests.columns import checked_arrays, checked_batch, column_name, column_names
from stdit_data.manifests.entries import ARROW, BLOCK, COLUMNS, KINDS, Entries, Entry
from stdit_data.manifests.rows import csv_rows, json_rows
from stdit_data.manifests.table_cache import open_table
from stdit_data.manifests.values import check_caption, describe
from stdit_data.storage import atomic, files, listing, readers, urls

__all__ = ["COLUMNS", "Entry", "Manifest", "check_manifest", "read_manifest", "write_manifest"]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
HEADERLESS = ["path", "caption", "num_frames"]  # Open-Sora 1.0's columns
MAX_CAPTION = 64 * 1024  # bytes of a caption's file
THREADS = 16  # that read captions
MANIFEST_SUFFIXES = (*DELIMITERS, ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest's entries, and the folder that their relative paths start from."""

    url: str
    folder: str
    entries: Entries

    def locate(self, entry: Entry) -> str:
        """Return the full path or URL of an entry's file."""
        return urls.join(self.folder, entry.path)


def read_manifest(url: str, *, root: str | None = None, confine: bool = False) -> Manifest:
    """Read a manifest file or a folder of clips.

    Args:
        url: a folder, or a file ending in .csv, .tsv, .jsonl, .ndjson or .parquet; local or any fsspec URL.
        root: the folder that relative paths start from; the manifest's own if not given.
        confine: refuse paths that lead out of this folder (absolute ones, URLs, `..`, links), as a stranger's may.

    Raises:
        DataError: the file does not exist, is of an unknown kind, or has wrong columns or values; or a path leads out
            of the folder.
    """
    manifest = _read(str(url), root)
    for path in manifest.entries.paths() if confine else ():
        if urls.leads_out(manifest.folder, path):
            raise DataError(f"{url}: path {path!r} leads out of {manifest.folder}, which is not allowed here")
    return manifest


def _read(url: str, root: str | None) -> Manifest:
    if not is_list(url):
        return Manifest(url, url, Entries.of(_folder(url)))
    _check_kind(url)
    kind = urls.suffix(url)
    table = open_table(url, partial(_batches_of, url, kind))
    used = [name for name in table.column_names if table[name].null_count < len(table)]
    return Manifest(url, root or urls.parent(url), Entries(table.select(used)))


def is_list(url: str) -> bool:
    """Return whether a manifest is a file by its suffix, not a folder of clips."""
    return urls.suffix(url) in MANIFEST_SUFFIXES


def _batches_of(url: str, kind: str) -> Iterator[pa.RecordBatch]:
    batches = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}.get(kind, _json_lines)(url)
    first = next(batches, None)
    if first is None:
        raise DataError(f"{url}: no entries; expected at least one line with a path")
    yield first
    yield from batches


def check_manifest(url: str) -> None:
    """Check that a manifest file or a folder of clips exists, without reading it; of a local folder that it has clips.

    Raises:
        DataError: it does not exist, is a folder without clips, or a file of an unknown kind.
    """
    _check_kind(url)
    if not is_list(url) and urls.is_local(url) and not any(map(urls.is_media, listing.walk_local(url))):
        raise _no_media(url)


def _check_kind(url: str) -> None:
    kind = urls.suffix(url)
    if is_list(url):
        if not files.exists(url):
            raise DataError(f"{url}: no such manifest")
    elif not files.is_folder(url):
        if not files.exists(url):
            raise DataError(f"{url}: no such folder or manifest")
        inside = f"; give its contents as zip://::{url}" if kind == ".zip" else ""
        raise DataError(
            f"{url}: expected a folder or a manifest ({', '.join(MANIFEST_SUFFIXES)}), found {kind or 'a file'}{inside}"
        )


def write_manifest(url: str, entries: Iterable[Entry]) -> int:
    """Write entries as CSV, JSON lines or Parquet, by the suffix; columns that no entry uses are left out.

    Returns:
        The number of entries written.

    Raises:
        DataError: the suffix is unknown, or the file can't be written.
    """
    kind = urls.suffix(url)
    if not is_list(url):
        raise DataError(f"{url}: expected a name ending in {', '.join(MANIFEST_SUFFIXES)}")
    rows = [asdict(entry) for entry in entries]
    for row in rows:
        _caption(f"{url}: {row['path']}", row["caption"])
        if row["path"][:1].isspace():
            row["path"] = f"./{row['path']}"  # readers drop spaces before a value
    used = [name for name in COLUMNS if name in ("path", "caption") or any(row[name] is not None for row in rows)]
    with atomic.open_write(url) as file:
        if kind == ".parquet":
            pq.write_table(_table(rows, used), file)
        elif kind in DELIMITERS:
            lines: list[str] = []
            target = SimpleNamespace(write=lines.append)
            writer = csv.writer(target, delimiter=DELIMITERS[kind], lineterminator="\r\n")  # so both are quoted
            writer.writerow(used)
            writer.writerows(["" if row[name] is None else row[name] for name in used] for row in rows)
            text = "".join(line.removesuffix("\r\n") + "\n" for line in lines)
            file.write(text.encode("utf-8", "surrogateescape"))  # file names that are not UTF-8 as they are
        else:
            for row in rows:
                file.write(files.json_line({name: row[name] for name in used if row[name] is not None}))
    return len(rows)


def _table(rows: Sequence[Mapping[str, Any]], used: Iterable[str]) -> pa.Table:
    """Make an Arrow table; the paths are bytes if one is not UTF-8."""
    columns = {
        name: pa.array([row[name] for row in rows], ARROW[KINDS.get(name, str)]) for name in used if name != "path"
    }
    return pa.table({"path": path_array([row["path"] for row in rows]), **columns})


def path_array(paths: Sequence[str]) -> pa.Array:
    """Make an Arrow array of paths: of texts, or of bytes if one is not UTF-8."""
    if all(urls.is_utf8(path) for path in paths):
        return pa.array(paths, pa.string())
    return pa.array([os.fsencode(path) for path in paths], pa.binary())


def read_csv(url: str) -> Iterator[tuple[int, list[str]]]:
    """Read the rows of a CSV or TSV file that have any text, and their line numbers; see `csv_rows`."""
    with _lines(url, "surrogateescape", "") as lines:
        for number, cells in csv_rows(url, lines, DELIMITERS[urls.suffix(url)]):
            if any(cell and not cell.isspace() for cell in cells):
                yield number, cells


@contextmanager
def _lines(url: str, errors: str, newline: str) -> Iterator[TextIO]:
    """Open a text file in UTF-8, whose lines end as `newline` says, see `open`."""
    with files.open_binary(url) as file, files.wrap_errors(url):
        yield TextIOWrapper(BytesIO(file.read()) if isinstance(file, RawIOBase) else file, "utf-8-sig", errors, newline)


def _csv(url: str) -> Iterator[pa.RecordBatch]:
    rows = read_csv(url)
    number, header = next(rows, (0, [""]))
    if not number:
        return
    headerless = urls.is_media(header[0].strip())
    if headerless:
        columns, rows = HEADERLESS, chain([(number, header)], rows)
    else:
        if not all(urls.is_utf8(name) for name in header):
            files.read_text(url)  # raises: UTF-16, for example
        columns = column_names(url, header)
    while block := list(islice(rows, BLOCK)):
        for number, cells in block:
            if len(cells) != len(columns):
                if headerless and len(cells) == 2:
                    cells.append("")
                    continue
                expected = "; without a header a line is path, caption[, num_frames]"
                expected = expected if headerless else f" for {len(columns)} columns"
                raise DataError(f"{url}, line {number}: {len(cells)} cells{expected}; quote captions that hold commas")
        values = zip(*(cells for _, cells in block), strict=True)
        found = {name: list(cells) for name, cells in zip(columns, values, strict=True) if name in COLUMNS}
        yield checked_batch(found, partial(_where, url, [number for number, _ in block]))


def _where(url: str, numbers: Sequence[int], row: int) -> str:
    return f"{url}, line {numbers[row]}"


def _row_at(url: str, first: int, row: int) -> str:
    return f"{url}, row {first + row}"


def _json_lines(url: str) -> Iterator[pa.RecordBatch]:
    known: dict[tuple[str, ...], list[tuple[str, str]]] = {}  # an object's keys; those of columns and their names
    with _lines(url, "strict", "\n") as lines:
        try:
            rows = json_rows(url, lines)
            while block := list(islice(rows, BLOCK)):
                dicts = []
                for number, row in block:
                    if not isinstance(row, dict):
                        raise DataError(
                            f"{url}, line {number}: found {describe(row)}; expected an object, as in "
                            '{"path": "a.mp4"}'
                        )
                    keys = tuple(row)
                    if keys not in known:
                        names = column_names(f"{url}, line {number}", keys)
                        known[keys] = [(key, name) for key, name in zip(keys, names, strict=True) if name in COLUMNS]
                    dicts.append({name: row[key] for key, name in known[keys]})
                found = {name: [row.get(name) for row in dicts] for name in COLUMNS}
                yield checked_batch(found, partial(_where, url, [number for number, _ in block]))
        except UnicodeDecodeError:
            files.read_text(url)  # raises, and names the byte
            raise


def _parquet(url: str) -> Iterator[pa.RecordBatch]:
    with files.open_binary(url) as file:
        try:
            table = pq.ParquetFile(file)
            found = table.schema_arrow.names
            kept = [name for name, column in zip(found, column_names(url, found), strict=True) if column in COLUMNS]
            number = 0
            for batch in table.iter_batches(batch_size=BLOCK, columns=kept):
                columns = {column_name(name): batch[name] for name in kept}
                yield checked_arrays(columns, partial(_row_at, url, number))
                number += len(batch)
        except FileError:  # of a store
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if files.is_passing(url, error):
                raise
            raise DataError(f"{url}: not Parquet, or damaged ({str(error).splitlines()[0]})") from None


def _folder(url: str) -> list[Entry]:
    found: list[str] = []
    if urls.is_local(url):
        _check_kind(url)
    with suppress(MissingFileError):  # explained below
        found = listing.walk(url)
    media = [path for path in found if urls.is_media(path)]
    if not media:
        _check_kind(url)
        raise _no_media(url)
    texts = {path for path in found if path.endswith(".txt")}

    def caption(path: str) -> str:
        beside = str(PurePosixPath(path).with_suffix(".txt"))
        if beside not in texts:
            return ""
        text = urls.join(url, beside)
        return _caption(text, files.read_text(text, limit=MAX_CAPTION))

    captions = readers.map_in_threads(caption, media, THREADS)
    return [Entry(path, text) for path, text in zip(media, captions, strict=True)]


def _no_media(url: str) -> DataError:
    return DataError(f"{url}: no videos (.mp4, .mkv, .webm, ...) or images (.jpg, .png, ...) in this folder or below")


def _caption(where: str, caption: str) -> str:
    """Check a caption that is not of a manifest's column, and put it on one line."""
    try:
        return " ".join(check_caption(caption).split())
    except DataError as error:
        raise DataError(f"{where}: the caption {error}") from None
