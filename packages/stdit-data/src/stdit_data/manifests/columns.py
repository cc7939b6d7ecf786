"""Check the rows of a manifest, whatever file they come from: by columns, and one by one where something is unusual."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from stdit_data.errors import DataError
from stdit_data.manifests.entries import COLUMNS, KINDS, Entry, to_batch
from stdit_data.manifests.values import (
    MISSING,
    check_caption,
    check_integer,
    check_number,
    check_origin,
    check_path,
    check_text,
)

CHECKS: dict[str, Callable[[Any], Any]] = {
    **{name: check_integer if kind is int else check_number for name, kind in KINDS.items()},
    "path": check_path,
    "caption": check_caption,
    "source": check_origin,
    "licence": check_origin,
}
ALIASES = {"text": "caption", "file": "path", "video": "path", "license": "licence"}
POSITIVE = ("fps", "width", "height", "num_frames")
EXACT = 2**53  # up to here a float holds every whole number


def column_name(name: str) -> str:
    """Return the name among `COLUMNS` of a file's column, or its own if it is none of these."""
    name = name.strip()
    known = ALIASES.get(name.lower(), name.lower())
    return known if known in COLUMNS else name


def column_names(where: str, found: Iterable[str]) -> list[str]:
    """Return the columns' names among `COLUMNS`; unknown columns keep their own and are ignored.

    Raises:
        DataError: a column occurs twice, or there is none of paths.
    """
    found = list(found)
    columns = [column_name(name) for name in found]
    twice = [column for column in COLUMNS if columns.count(column) > 1]
    if "path" not in columns or twice:
        fault = f"column {twice[0]!r} occurs twice" if twice else "no column 'path'"
        names = ", ".join(name.strip() for name in found) or "none"
        raise DataError(f"{where}: {fault}; found {names}; known columns: {', '.join(COLUMNS)}")
    return columns


def checked_batch(columns: dict[str, list[Any]], where: Callable[[int], str]) -> pa.RecordBatch:
    """Check rows and make a batch of them.

    Args:
        columns: the values of each column of `COLUMNS` that the file has, as text or of any other type.
        where: names the file and a row by its number within `columns`, in messages.

    Raises:
        DataError: a value is wrong; the message names the first row with one.
    """
    if (batch := _plain_batch(columns)) is not None:
        return batch
    rows = zip(*columns.values(), strict=True)
    entries = [check_row(where(i), dict(zip(columns, row, strict=True))) for i, row in enumerate(rows)]
    return to_batch({name: [getattr(entry, name) for entry in entries] for name in columns})


def check_row(where: str, row: Mapping[str, Any]) -> Entry:
    """Make an entry from column values and check them; `where` names the line in messages.

    Raises:
        DataError: a value is wrong.
    """
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
        positive = name in POSITIVE
        if value is not None and (value < 0 or (positive and value == 0)):
            raise DataError(f"{where}: {name} is {value}; expected a number {'above' if positive else 'from'} 0")
    bounds = [(entry.start, entry.end), (entry.start_frame, entry.end_frame)]
    if all(low is not None or high is not None for low, high in bounds):
        raise DataError(f"{where}: both start/end and start_frame/end_frame; expected one of the two")
    for low, high in bounds:
        if high is not None and high <= (low or 0):
            raise DataError(f"{where}: the segment ends at {high:g} and starts at {low or 0:g}; expected start < end")
    return entry


def _plain_batch(columns: Mapping[str, list[Any]]) -> pa.RecordBatch | None:
    """Make the batch that `check_row` would, column by column; None if a value is wrong or of an unusual type."""
    try:
        texts = {name: _plain_texts(values) for name, values in columns.items() if name not in KINDS}
        if not all(texts["path"]) or any("\0" in (path or "") for path in texts["path"]):
            return None
        for name in ("path", "caption"):
            if any(text and len(text) <= 5 and text.lower() in MISSING for text in texts.get(name, ())):
                return None
        numbers = {name: _plain_numbers(values, KINDS[name]) for name, values in columns.items() if name in KINDS}
        batch = to_batch({name: texts[name] if name in texts else numbers[name] for name in columns})
    except (ValueError, TypeError, OverflowError, pa.ArrowException):  # UnicodeEncodeError among them
        return None
    found = {name: _floats(batch[name]) for name in numbers}
    least = {name: np.nextafter(0, 1) if name in POSITIVE else 0 for name in found}
    if any(((values < least[name]) | (values >= EXACT)).any() for name, values in found.items()):
        return None
    nothing = np.full(len(batch), np.nan)
    start, end, first, last = (found.get(name, nothing) for name in ("start", "end", "start_frame", "end_frame"))
    both = ~(np.isnan(start) & np.isnan(end)) & ~(np.isnan(first) & np.isnan(last))
    empty = (end <= np.nan_to_num(start)) | (last <= np.nan_to_num(first))
    return None if (both | empty).any() else batch


def _plain_texts(values: list[Any]) -> list[str | None]:
    if not set(map(type, values)) <= {str, type(None)}:
        raise TypeError
    return [value.strip() or None if value else None for value in values]


def _plain_numbers(values: list[Any], kind: type) -> list[float | None] | list[int | None]:
    types = set(map(type, values)) - {type(None)}
    if types <= {kind} and kind is int:
        return values
    if not (types <= {str} or types <= {int, float}):
        raise TypeError
    if types <= {str}:
        values = [value if value and not value.isspace() else None for value in values]
        if kind is int and not any(value and "." in value for value in values):
            return [None if value is None else int(value) for value in values]
    else:
        values = [None if value != value else value for value in values]
    floats = [None if value is None else float(value) for value in values]
    if not all(value is None or -EXACT < value < EXACT for value in floats):
        raise ValueError
    if kind is float:
        return floats
    whole = [None if value is None else int(value) for value in floats]
    if whole != floats:
        raise ValueError
    return whole


def _floats(array: pa.Array) -> np.ndarray:
    values: np.ndarray = array.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)
    return values
