"""Check the values of a manifest's columns. The messages of errors go after the name of a column."""

from __future__ import annotations

import os
from contextlib import suppress
from decimal import Decimal
from math import isfinite
from typing import Any

from stdit_data.errors import DataError

MISSING = frozenset(("nan", "none", "null", "na", "n/a", "#n/a", "<na>"))  # as pandas and R write a missing value


def check_text(value: Any) -> str:
    """Return a text without spaces around it.

    Raises:
        DataError: the value is no text, or not Unicode.
    """
    if not isinstance(value, str):
        raise DataError(f"is {describe(value)}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"is not UTF-8 text at character {error.start + 1}; save the file as UTF-8") from None
    return value.strip()


def check_caption(value: Any) -> str:
    """Return a caption or prompt without spaces around it.

    Raises:
        DataError: the value is no text, not Unicode, or a missing value written as text.
    """
    text = check_text(value)
    if text.lower() in MISSING:
        raise DataError(f"is {text!r}, a missing value written as text; leave it empty")
    return text


def check_origin(value: Any) -> str:
    """Return a text, or a number as text, such as the id of a source.

    Raises:
        DataError: the value is anything else.
    """
    return check_text(str(value) if type(value) in (int, float) else value)


def check_path(value: Any) -> str:
    """Return a path or URL; one that is not UTF-8, as file names may be, is bytes or as Python decodes file names.

    Raises:
        DataError: the value is no text, a missing value written as text, or cannot name a file.
    """
    path = os.fsdecode(value) if isinstance(value, bytes) else value
    if not isinstance(path, str):
        return check_text(path)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return check_text(path)
    if "\0" in path or path.lower() in MISSING:
        raise DataError(f"is {path!r}; expected the video's path or URL")
    return path


def check_number(value: Any) -> float:
    """Return a finite number; a text of one is accepted.

    Raises:
        DataError: the value is anything else.
    """
    if isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = float("nan")
        if isfinite(number):
            return number
    raise DataError(f"is {describe(value)}; expected a number")


def check_integer(value: Any) -> int:
    """Return a whole number; a text of one is accepted, also as 3.0: pandas writes columns with gaps so.

    Raises:
        DataError: the value is anything else.
    """
    whole = value
    if isinstance(value, str):
        with suppress(ValueError):
            whole = int(value)
    if not isinstance(whole, int) or isinstance(whole, bool):
        with suppress(DataError):
            number = check_number(value)
            whole = int(number) if number == int(number) else None
    if type(whole) is not int or abs(whole) >= 2**63:
        raise DataError(f"is {describe(value)}; expected a whole number")
    return whole


def describe(value: Any) -> str:
    """Describe a value of JSON or Parquet: `a list`, `an object`, `bytes`, or the value itself."""
    names = {list: "a list", tuple: "a list", dict: "an object", bytes: "bytes", bool: str(value).lower()}
    return next((name for kind, name in names.items() if isinstance(value, kind)), repr(value))
