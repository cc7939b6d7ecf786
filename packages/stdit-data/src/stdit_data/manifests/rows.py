"""Read CSV and JSON lines strictly: rows with the number of the line on which each begins."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from io import StringIO
from itertools import chain, islice
from typing import Any

from stdit_data.errors import DataError

AT_ONCE = 4096  # rows


def csv_rows(name: str, text: str | Iterable[str], delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Split CSV into rows of cells; blank lines are left out.

    A cell is quoted as a whole or not at all. A quoted cell may contain line breaks and have any length.

    Args:
        name: name of the text in messages.
        text: the text, or a file whose line ends are not translated.
        delimiter: what separates the cells.

    Yields:
        The first line of each row, from 1, and its cells.

    Raises:
        DataError: a quote is not closed, or a quoted cell goes on after its closing quote.
    """
    lines = StringIO(text, newline="") if isinstance(text, str) else text
    return chain.from_iterable(_csv_blocks(name, lines, delimiter))


def _csv_blocks(name: str, lines: Iterable[str], delimiter: str) -> Iterator[list[tuple[int, list[str]]]]:
    # Not line by line: a quoted cell may contain a line break.
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    rows, line, failed = [(0, [""])], 1, False
    while rows and not failed:
        rows = []
        limit = csv.field_size_limit(2**31 - 1)
        try:
            for cells in islice(reader, AT_ONCE):
                rows.append((line, cells))
                line = reader.line_num + 1
        except csv.Error:  # in strict mode, of quotes alone
            failed = True
        finally:
            csv.field_size_limit(limit)
        yield [row for row in rows if row[1]]
    if failed:
        raise DataError(
            f"{name}, line {line}: a quote that is not closed, or text after a closing quote; quote the whole cell and "
            'double the quotes in it, as in "He says ""go"""'
        )


def json_rows(name: str, text: str | Iterable[str]) -> Iterator[tuple[int, Any]]:
    r"""Parse JSON lines, which end at `\n` alone; blank lines are left out.

    Args:
        name: name of the text in messages.
        text: the text, or its lines.

    Yields:
        The number of each line, from 1, and its value. The names of an object's keys are without spaces around them.

    Raises:
        DataError: a line is not JSON, or an object has a key twice.
    """
    for number, line in enumerate(text.split("\n") if isinstance(text, str) else text, 1):
        line = line.removesuffix("\n")
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, deep nesting
            raise DataError(f"{name}, line {number}: {' '.join(str(error).split())}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) == len(pairs) and all(key.isidentifier() for key in row):  # nearly always, and faster
        return row
    row = {}
    for key, value in pairs:
        if key.strip() in row:
            raise ValueError(f"key {key.strip()!r} occurs twice")
        row[key.strip()] = value
    return row
