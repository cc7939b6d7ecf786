"""Read CSV and JSON lines strictly: rows with the number of the line on which each begins."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from stdit_data.errors import DataError


def csv_rows(name: str, text: str, delimiter: str = ",") -> list[tuple[int, list[str]]]:
    """Split CSV into rows of cells; blank lines are left out.

    A cell is quoted as a whole or not at all. A quoted cell may contain line breaks and have any length.

    Args:
        name: name of the text in messages.
        text: the text, of any size.
        delimiter: what separates the cells.

    Returns:
        The first line of each row, from 1, and its cells.

    Raises:
        DataError: a quote is not closed, or a quoted cell goes on after its closing quote.
    """
    # Not line by line: a quoted cell may contain a line break.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    rows, line = [], 1
    limit = csv.field_size_limit(min(len(text) + 1, 2**31 - 1))
    try:
        for cells in reader:
            if cells:
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error:  # in strict mode, of quotes alone
        raise DataError(
            f"{name}, line {line}: a quote that is not closed, or text after a closing quote; quote the whole cell and "
            'double the quotes in it, as in "He says ""go"""'
        ) from None
    finally:
        csv.field_size_limit(limit)
    return rows


def json_rows(name: str, text: str) -> Iterator[tuple[int, Any]]:
    r"""Parse JSON lines, which end at `\n` alone; blank lines are left out.

    Args:
        name: name of the text in messages.
        text: the text.

    Yields:
        The number of each line, from 1, and its value. The names of an object's keys are without spaces around them.

    Raises:
        DataError: a line is not JSON, or an object has a key twice.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, deep nesting
            raise DataError(f"{name}, line {number}: {' '.join(str(error).split())}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key.strip() in row:
            raise ValueError(f"key {key.strip()!r} occurs twice")
        row[key.strip()] = value
    return row
