"""Read and write manifests: lists of captioned clips.

A manifest is a CSV, JSON lines or Parquet file with named columns (`COLUMNS`), the header-less CSV of Open-Sora 1.0, or
a folder of videos and images with captions in `name.txt` beside them; local or at any fsspec URL.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stdit_data import files
from stdit_data.errors import DataError
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
ALIASES = {"text": "caption", "file": "path", "video": "path", "license": "licence"}
MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest's entries, and the folder that their relative paths start from."""

    url: str
    folder: str
    entries: list[Entry]

    def locate(self, entry: Entry) -> str:
        """Return the full path or URL of an entry's file."""
        return files.join(self.folder, entry.path)


def read_manifest(url: str, *, root: str | None = None) -> Manifest:
    """Read a manifest file or a folder of clips.

    Args:
        url: a folder, or a file ending in .csv, .tsv, .jsonl, .ndjson or .parquet; local or any fsspec URL.
        root: the folder that relative paths start from; the manifest's own if not given.

    Raises:
        DataError: the file does not exist, is of an unknown kind, or has wrong columns or values.
    """
    url = str(url)
    kind = files.suffix(url)
    if kind in MANIFEST_SUFFIXES:
        if not files.exists(url):
            raise DataError(f"{url}: no such manifest")
        rows = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}.get(kind, _json_lines)(url)
        entries = list(rows)
        if not entries:
            raise DataError(f"{url}: no entries; expected at least one line with a path")
        return Manifest(url, root or files.parent(url), entries)
    if files.is_folder(url):
        return Manifest(url, url, _folder(url))
    if files.exists(url):
        inside = f"; give its contents as zip://::{url}" if kind == ".zip" else ""
        raise DataError(
            f"{url}: expected a folder or a manifest ({', '.join(MANIFEST_SUFFIXES)}), found {kind or 'a file'}{inside}"
        )
    raise DataError(f"{url}: no such folder or manifest")


def write_manifest(url: str, entries: Iterable[Entry]) -> int:
    """Write entries as CSV, JSON lines or Parquet, by the suffix; columns that no entry uses are left out.

    Returns:
        The number of entries written.

    Raises:
        DataError: the suffix is unknown, or the file can't be written.
    """
    kind = files.suffix(url)
    if kind not in MANIFEST_SUFFIXES:
        raise DataError(f"{url}: expected a name ending in {', '.join(MANIFEST_SUFFIXES)}")
    rows = [asdict(entry) for entry in entries]
    used = [name for name in COLUMNS if name in ("path", "caption") or any(row[name] is not None for row in rows)]
    with files.open_write(url) as file:
        if kind == ".parquet":
            arrow = {float: pa.float64(), int: pa.int64()}
            schema = pa.schema([(name, arrow.get(KINDS.get(name, str), pa.string())) for name in used])
            pq.write_table(pa.Table.from_pylist([{name: row[name] for name in used} for row in rows], schema), file)
            return len(rows)
        text = io.StringIO(newline="")
        if kind in (".csv", ".tsv"):
            writer = csv.writer(text, delimiter="\t" if kind == ".tsv" else ",", lineterminator="\n")
            writer.writerow(used)
            writer.writerows(["" if row[name] is None else row[name] for name in used] for row in rows)
        else:
            for row in rows:
                kept = {name: row[name] for name in used if row[name] is not None}
                text.write(json.dumps(kept, ensure_ascii=False) + "\n")
        file.write(text.getvalue().encode())
    return len(rows)


def _entry(where: str, row: Mapping[str, Any]) -> Entry:
    """Make an entry from column values and check them; `where` names the line in messages."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        if value is None or value == "" or value != value:  # an empty cell; a Parquet NaN
            continue
        kind = KINDS.get(name, str)
        try:
            number = kind(value)
            if kind is int and float(value) != number:
                raise ValueError
        except (ValueError, TypeError):
            if kind is int and str(value).removesuffix(".0").isdigit():  # pandas writes int columns with gaps as 3.0
                number = int(float(value))
            else:
                expected = {float: "a number", int: "a whole number"}.get(kind, "text")
                raise DataError(f"{where}: {name} is {value!r}; expected {expected}") from None
        values[name] = number.strip() if isinstance(number, str) else number
    if not values.get("path"):
        raise DataError(f"{where}: no path; expected the video's path or URL in column 'path'")
    entry = Entry(**values)
    for name in KINDS:
        value = getattr(entry, name)
        positive = name in ("fps", "width", "height", "num_frames")
        if value is not None and (value < 0 or (positive and value == 0) or value == float("inf")):
            raise DataError(f"{where}: {name} is {value}; expected a number {'above' if positive else 'from'} 0")
    bounds = [(entry.start, entry.end), (entry.start_frame, entry.end_frame)]
    if all(low is not None or high is not None for low, high in bounds):
        raise DataError(f"{where}: both start/end and start_frame/end_frame; expected one of the two")
    for low, high in bounds:
        if high is not None and high <= (low or 0):
            raise DataError(f"{where}: the segment ends at {high:g} and starts at {low or 0:g}; expected start < end")
    return entry


def _names(url: str, found: Iterable[str]) -> dict[str, str]:
    """Map the file's column names to those of `COLUMNS`; unknown columns are ignored."""
    found = [name.strip() for name in found]
    columns = [ALIASES.get(name.lower(), name.lower()) for name in found]
    twice = [column for column in COLUMNS if columns.count(column) > 1]
    if "path" not in columns or twice:
        fault = f"column {twice[0]!r} occurs twice" if twice else "no column 'path'"
        raise DataError(f"{url}: {fault}; found {', '.join(found) or 'none'}; known columns: {', '.join(COLUMNS)}")
    return {name: column for name, column in zip(found, columns, strict=True) if column in COLUMNS}


def _csv(url: str) -> Iterator[Entry]:
    # Not line by line: a quoted caption may hold a line break.
    rows = csv.reader(
        io.StringIO(files.read_text(url), newline=""), delimiter="\t" if files.suffix(url) == ".tsv" else ","
    )
    try:
        lines = [(rows.line_num, row) for row in rows if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{url}, line {rows.line_num}: not CSV ({error})") from None
    if not lines:
        return
    header = lines[0][1]
    if _headerless(header):
        for number, row in lines:
            if len(row) not in (2, 3):
                raise DataError(
                    f"{url}, line {number}: {len(row)} cells; without a header a line is path, caption[, num_frames]; "
                    "quote captions that hold commas"
                )
            yield _entry(f"{url}, line {number}", dict(zip(("path", "caption", "num_frames"), row, strict=False)))
        return
    names = _names(url, header)
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise DataError(
                f"{url}, line {number}: {len(row)} cells for {len(header)} columns; quote captions that hold commas"
            )
        cells = zip([name.strip() for name in header], row, strict=True)
        yield _entry(f"{url}, line {number}", {names[name]: cell for name, cell in cells if name in names})


def _headerless(first: list[str]) -> bool:
    """Return whether the first row is an entry: in Open-Sora 1.0's CSV its first cell is a video or an image."""
    return files.suffix(first[0].strip()) in files.VIDEO_SUFFIXES | files.IMAGE_SUFFIXES


def _json_lines(url: str) -> Iterator[Entry]:
    for number, line in enumerate(files.read_text(url).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{url}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise DataError(f'{where}: found a {type(row).__name__}; expected an object, as in {{"path": "a.mp4"}}')
        names = _names(where, row)
        yield _entry(where, {column: row[name] for name, column in names.items()})


def _parquet(url: str) -> Iterator[Entry]:
    with files.open_binary(url) as file:
        try:
            table = pq.ParquetFile(file)
            names = _names(url, table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(columns=list(names)):
                for row in batch.to_pylist():
                    yield _entry(f"{url}, row {number}", {column: row[name] for name, column in names.items()})
                    number += 1
        except pa.ArrowInvalid as error:
            raise DataError(f"{url}: not Parquet ({str(error).splitlines()[0]})") from None


def _folder(url: str) -> list[Entry]:
    found = files.walk(url)
    media = [path for path in found if files.suffix(path) in files.VIDEO_SUFFIXES | files.IMAGE_SUFFIXES]
    if not media:
        raise DataError(
            f"{url}: no videos (.mp4, .mkv, .webm, ...) or images (.jpg, .png, ...) in this folder or below"
        )
    texts = {path for path in found if path.endswith(".txt")}
    entries = []
    for path in media:
        beside = str(PurePosixPath(path).with_suffix(".txt"))
        caption = files.read_text(files.join(url, beside)) if beside in texts else ""
        entries.append(Entry(path, " ".join(caption.split())))
    return entries
