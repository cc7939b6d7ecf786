"""Check the rows of a manifest, whatever file they come from: by columns, and one by one where something is unusual."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stdit_data.errors import DataError
from stdit_data.manifests.arrays import floats, from_numpy, text_scalar
from stdit_data.manifests.entries import COLUMNS, KINDS, SCHEMA, Entry, to_batch
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
    "group": check_origin,
}
ALIASES = {"text": "caption", "file": "path", "video": "path", "license": "licence"}
POSITIVE = ("fps", "width", "height", "num_frames")
EXACT = 2**53  # up to here a float holds every whole number
SHORT = max(map(len, MISSING))
NO_SPACE = r"^[^\p{Z}\p{Cc}]?$"  # a character that is no space by any measure, or none


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


def checked_arrays(columns: dict[str, pa.Array], where: Callable[[int], str]) -> pa.RecordBatch:
    """As `checked_batch`, for columns that are Arrow arrays: as arrays where nothing is unusual."""
    if (batch := _plain_arrays(columns)) is not None:
        return batch
    return checked_batch({name: values.to_pylist() for name, values in columns.items()}, where)


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
            if any(text and len(text) <= SHORT and text.lower() in MISSING for text in texts.get(name, ())):
                return None
        numbers = {name: _plain_numbers(values, KINDS[name]) for name, values in columns.items() if name in KINDS}
        batch = to_batch({name: texts[name] if name in texts else numbers[name] for name in columns})
    except (ValueError, TypeError, OverflowError, pa.ArrowException):  # UnicodeEncodeError among them
        return None
    return batch if _fits(batch) else None


def _plain_arrays(columns: Mapping[str, pa.Array]) -> pa.RecordBatch | None:
    """As `_plain_batch`, without an object for each value."""
    try:
        arrays = {
            name: _number_array(array, KINDS[name])
            if name in KINDS
            else _text_array(array, numbers=CHECKS.get(name) is check_origin)
            for name, array in columns.items()
        }
    except (ValueError, TypeError, OverflowError, pa.ArrowException):
        return None
    if arrays["path"].null_count or pc.any(pc.match_substring(arrays["path"], "\0")).as_py():
        return None
    for name in ("path", "caption"):
        if name in arrays:
            short = np.flatnonzero(floats(pc.binary_length(arrays[name])) <= SHORT)
            if any(text and text.lower() in MISSING for text in arrays[name].take(from_numpy(short)).to_pylist()):
                return None
    arrays = {name: array.cast(SCHEMA.field(name).type) for name, array in arrays.items()}
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
    return batch if _fits(batch) else None


def _text_array(array: pa.Array, *, numbers: bool) -> pa.Array:
    """Return texts, null where they are empty; raise where one might have spaces around it.

    Args:
        numbers: take whole numbers as well.
    """
    if pa.types.is_null(array.type) or (numbers and pa.types.is_integer(array.type)):
        return array.cast(pa.large_string())
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        raise TypeError
    array.validate(full=True)  # as UTF-8
    array = array.cast(pa.large_string())
    ends = (pc.utf8_slice_codeunits(array, 0, 1), pc.utf8_slice_codeunits(array, -1))
    if not all(pc.all(pc.match_substring_regex(end, NO_SPACE)).as_py() in (True, None) for end in ends):
        raise ValueError
    if not (floats(pc.binary_length(array)) == 0).any():
        return array
    return pc.if_else(pc.equal(array, text_scalar("")), pa.nulls(1, array.type)[0], array)


def _number_array(array: pa.Array, kind: type) -> pa.Array:
    """Return numbers, null where they are missing; raise where one is unusual."""
    if pa.types.is_integer(array.type) and kind is int:
        return array.cast(pa.int64())
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_null(array.type)):
        raise TypeError
    array = array.cast(pa.float64())
    values = floats(array)
    missing = np.isnan(values)
    if not (np.abs(values[~missing]) < EXACT).all() or (kind is int and (values != np.floor(values))[~missing].any()):
        raise ValueError
    if missing.any():
        array = pc.if_else(pc.is_nan(array), pa.nulls(1, array.type)[0], array)
    return array.cast(pa.int64()) if kind is int else array


def _fits(batch: pa.RecordBatch) -> bool:
    """Return whether all numbers, and the segments that they make, are in bounds."""
    found = {name: floats(batch[name]) for name in batch.schema.names if name in KINDS}
    least = {name: np.nextafter(0, 1) if name in POSITIVE else 0 for name in found}
    if any(((values < least[name]) | (values >= EXACT)).any() for name, values in found.items()):
        return False
    nothing = np.full(len(batch), np.nan)
    start, end, first, last = (found.get(name, nothing) for name in ("start", "end", "start_frame", "end_frame"))
    both = ~(np.isnan(start) & np.isnan(end)) & ~(np.isnan(first) & np.isnan(last))
    empty = (end <= np.nan_to_num(start)) | (last <= np.nan_to_num(first))
    return not (both | empty).any()


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
