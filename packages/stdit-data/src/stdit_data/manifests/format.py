"""Read and write manifests: lists of captioned clips.

A manifest is a CSV, JSON lines or Parquet file with named columns (`COLUMNS`), the header-less CSV of Open-Sora 1.0, or
a folder of videos and images with captions in `name.txt` beside them; local or at any fsspec URL.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stdit_data import files, urls
from stdit_data.errors import DataError, FileError
from stdit_data.manifests.rows import csv_rows, json_rows
from stdit_data.manifests.values import (
    check_caption,
    check_integer,
    check_number,
    check_origin,
    check_path,
    check_text,
    describe,
)
from stdit_data.video.frames import Segment


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
ARROW = {float: pa.float64(), int: pa.int64(), str: pa.string()}
CHECKS: dict[str, Callable[[Any], Any]] = {
    **{name: check_integer if kind is int else check_number for name, kind in KINDS.items()},
    "path": check_path,
    "caption": check_caption,
    "source": check_origin,
    "licence": check_origin,
}
ALIASES = {"text": "caption", "file": "path", "video": "path", "license": "licence"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_CAPTION = 64 * 1024  # bytes of a caption's file
MANIFEST_SUFFIXES = (*DELIMITERS, ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest's entries, and the folder that their relative paths start from."""

    url: str
    folder: str
    entries: list[Entry]

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
    for entry in manifest.entries if confine else ():
        if urls.leads_out(manifest.folder, entry.path):
            raise DataError(f"{url}: path {entry.path!r} leads out of {manifest.folder}, which is not allowed here")
    return manifest


def _read(url: str, root: str | None) -> Manifest:
    check_manifest(url)
    kind = urls.suffix(url)
    if kind not in MANIFEST_SUFFIXES:
        return Manifest(url, url, _folder(url))
    rows = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}.get(kind, _json_lines)(url)
    entries = list(rows)
    if not entries:
        raise DataError(f"{url}: no entries; expected at least one line with a path")
    return Manifest(url, root or urls.parent(url), entries)


def check_manifest(url: str) -> None:
    """Check that a manifest file or a folder of clips exists, without reading it; of a local folder that it has clips.

    Raises:
        DataError: it does not exist, is a folder without clips, or a file of an unknown kind.
    """
    kind = urls.suffix(url)
    if kind in MANIFEST_SUFFIXES:
        if not files.exists(url):
            raise DataError(f"{url}: no such manifest")
    elif not files.is_folder(url):
        if not files.exists(url):
            raise DataError(f"{url}: no such folder or manifest")
        inside = f"; give its contents as zip://::{url}" if kind == ".zip" else ""
        raise DataError(
            f"{url}: expected a folder or a manifest ({', '.join(MANIFEST_SUFFIXES)}), found {kind or 'a file'}{inside}"
        )
    elif urls.is_local(url) and not any(map(urls.is_media, files.walk_local(url))):
        raise _no_media(url)


def write_manifest(url: str, entries: Iterable[Entry]) -> int:
    """Write entries as CSV, JSON lines or Parquet, by the suffix; columns that no entry uses are left out.

    Returns:
        The number of entries written.

    Raises:
        DataError: the suffix is unknown, or the file can't be written.
    """
    kind = urls.suffix(url)
    if kind not in MANIFEST_SUFFIXES:
        raise DataError(f"{url}: expected a name ending in {', '.join(MANIFEST_SUFFIXES)}")
    rows = [asdict(entry) for entry in entries]
    for row in rows:
        _caption(f"{url}: {row['path']}", row["caption"])
        if row["path"][:1].isspace():
            row["path"] = f"./{row['path']}"  # readers drop spaces before a value
    used = [name for name in COLUMNS if name in ("path", "caption") or any(row[name] is not None for row in rows)]
    with files.open_write(url) as file:
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


def _entry(where: str, row: Mapping[str, Any]) -> Entry:
    """Make an entry from column values and check them; `where` names the line in messages."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        value = value.strip() if isinstance(value, str) else value
        if value is None or value == "" or value != value:  # an empty cell; a Parquet NaN
            continue
        try:
            values[name] = CHECKS.get(name, check_text)(value)
        except DataError as error:
            raise DataError(f"{where}: {name} {error}") from None
    if not values.get("path"):
        raise DataError(f"{where}: no path; expected the video's path or URL in column 'path'")
    entry = Entry(**values)
    for name in KINDS:
        value = getattr(entry, name)
        positive = name in ("fps", "width", "height", "num_frames")
        if value is not None and (value < 0 or (positive and value == 0)):
            raise DataError(f"{where}: {name} is {value}; expected a number {'above' if positive else 'from'} 0")
    bounds = [(entry.start, entry.end), (entry.start_frame, entry.end_frame)]
    if all(low is not None or high is not None for low, high in bounds):
        raise DataError(f"{where}: both start/end and start_frame/end_frame; expected one of the two")
    for low, high in bounds:
        if high is not None and high <= (low or 0):
            raise DataError(f"{where}: the segment ends at {high:g} and starts at {low or 0:g}; expected start < end")
    return entry


def column_name(name: str) -> str:
    """Return the name among `COLUMNS` of a file's column, or its own if it is none of these."""
    name = name.strip()
    known = ALIASES.get(name.lower(), name.lower())
    return known if known in COLUMNS else name


def _columns(where: str, found: Iterable[str]) -> list[str]:
    """Return the columns' names among `COLUMNS`; unknown columns keep their own and are ignored."""
    found = list(found)
    columns = [column_name(name) for name in found]
    twice = [column for column in COLUMNS if columns.count(column) > 1]
    if "path" not in columns or twice:
        fault = f"column {twice[0]!r} occurs twice" if twice else "no column 'path'"
        names = ", ".join(name.strip() for name in found) or "none"
        raise DataError(f"{where}: {fault}; found {names}; known columns: {', '.join(COLUMNS)}")
    return columns


def _row(columns: Iterable[str], values: Iterable[Any]) -> dict[str, Any]:
    return {name: value for name, value in zip(columns, values, strict=True) if name in COLUMNS}


def read_csv(url: str) -> list[tuple[int, list[str]]]:
    """Read the rows of a CSV or TSV file that have any text, and their line numbers; see `csv_rows`."""
    rows = csv_rows(url, files.read_text(url, escape=True), DELIMITERS[urls.suffix(url)])
    return [(number, cells) for number, cells in rows if any(cell.strip() for cell in cells)]


def _csv(url: str) -> Iterator[Entry]:
    rows = read_csv(url)
    if not rows:
        return
    header = rows[0][1]
    columns = ["path", "caption", "num_frames"]  # Open-Sora 1.0's
    headerless = urls.is_media(header[0].strip())
    if not headerless:
        if not all(urls.is_utf8(name) for name in header):
            files.read_text(url)  # raises: UTF-16, for example
        columns = _columns(url, header)
    for number, cells in rows if headerless else rows[1:]:
        where = f"{url}, line {number}"
        if len(cells) != len(columns) and not (headerless and len(cells) == 2):
            expected = "; without a header a line is path, caption[, num_frames]"
            expected = expected if headerless else f" for {len(columns)} columns"
            raise DataError(f"{where}: {len(cells)} cells{expected}; quote captions that hold commas")
        yield _entry(where, _row(columns[: len(cells)], cells))


def _json_lines(url: str) -> Iterator[Entry]:
    for number, row in json_rows(url, files.read_text(url)):
        where = f"{url}, line {number}"
        if not isinstance(row, dict):
            raise DataError(f'{where}: found {describe(row)}; expected an object, as in {{"path": "a.mp4"}}')
        yield _entry(where, _row(_columns(where, row), row.values()))


def _parquet(url: str) -> Iterator[Entry]:
    with files.open_binary(url) as file:
        try:
            table = pq.ParquetFile(file)
            found = table.schema_arrow.names
            kept = [name for name, column in zip(found, _columns(url, found), strict=True) if column in COLUMNS]
            number = 0
            for batch in table.iter_batches(columns=kept):
                for row in batch.to_pylist():
                    yield _entry(f"{url}, row {number}", {column_name(name): value for name, value in row.items()})
                    number += 1
        except FileError:  # of a store
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{url}: not Parquet, or damaged ({str(error).splitlines()[0]})") from None


def _folder(url: str) -> list[Entry]:
    found = files.walk(url)
    media = [path for path in found if urls.is_media(path)]
    if not media:
        raise _no_media(url)
    texts = {path for path in found if path.endswith(".txt")}
    entries = []
    for path in media:
        beside = str(PurePosixPath(path).with_suffix(".txt"))
        caption = files.read_text(urls.join(url, beside), limit=MAX_CAPTION) if beside in texts else ""
        entries.append(Entry(path, _caption(urls.join(url, beside), caption)))
    return entries


def _no_media(url: str) -> DataError:
    return DataError(f"{url}: no videos (.mp4, .mkv, .webm, ...) or images (.jpg, .png, ...) in this folder or below")


def _caption(where: str, caption: str) -> str:
    """Check a caption that is not of a manifest's column, and put it on one line."""
    try:
        return " ".join(check_caption(caption).split())
    except DataError as error:
        raise DataError(f"{where}: the caption {error}") from None
