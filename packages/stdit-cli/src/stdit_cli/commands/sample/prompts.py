"""Read the prompts of a file."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stdit_cli.commands.sample.request import SEED_MAX, PromptRequest
from stdit_data.errors import DataError
from stdit_data.manifests.rows import csv_rows, json_rows
from stdit_data.manifests.values import check_caption, check_integer, describe
from stdit_train.errors import ConfigError

PROMPT_KEYS = ("prompt", "caption", "text")  # of the column or key that holds the prompt
COMMENT = re.compile(r"#(\s|$)")


def read_prompts(path: Path) -> list[PromptRequest]:
    """Read the prompts of a file, in order.

    A .txt has one per line; blank lines and those that begin with "# " are skipped. A .csv or .tsv has a header with a
    column `prompt` (or `caption`, `text`); each line of a .jsonl is an object with such a key, or a string. `seed` and
    `negative` may stand beside the prompt.

    Raises:
        ConfigError, DataError: no such file, no prompts in it, or a line that cannot be read; the message names it.
    """
    readers = {".txt": _lines, ".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines}
    name = f"--prompts {path}"
    if not path.is_file():
        raise ConfigError(f"{name}: no such file")
    if path.suffix.lower() not in readers:
        raise ConfigError(f"{name}: expected a .txt, .csv or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from error
    rows = readers[path.suffix.lower()](name, text)
    prompts = [_prompt(f"{name}, line {number}", row) for number, row in rows]
    if not prompts:
        raise ConfigError(f"{name}: holds no prompts")
    return prompts


def _lines(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not COMMENT.match(line):
            yield number, {"prompt": line}


def _csv(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = list(csv_rows(name, text, "\t" if name.lower().endswith(".tsv") else ","))
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    if not any(key in header for key in PROMPT_KEYS):
        raise ConfigError(
            f"{name}: no column {' or '.join(PROMPT_KEYS)} in its header ({', '.join(header) or 'empty'})"
        )
    for number, cells in rows[1:]:
        if len(cells) > len(header):
            raise ConfigError(
                f"{name}, line {number}: more values than columns; put quotes around a prompt that contains commas"
            )
        yield number, dict(zip(header, cells, strict=False))


def _json_lines(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in json_rows(name, text):
        if isinstance(row, str):
            yield number, {"prompt": row}
        elif isinstance(row, dict):
            yield number, {key.lower(): value for key, value in row.items()}
        else:
            raise ConfigError(f"{name}, line {number}: found {describe(row)}; expected an object or a string")


def _prompt(where: str, row: dict[str, Any]) -> PromptRequest:
    """Check the prompt that the values of one row describe."""
    given = {key: value for key, value in row.items() if not _is_empty(value)}
    key = next((key for key in PROMPT_KEYS if key in given), None)
    if key is None:
        raise ConfigError(f"{where}: no {' or '.join(PROMPT_KEYS)}")
    values: dict[str, Any] = {}
    for name, check in ((key, check_caption), ("seed", _check_seed), ("negative", check_caption)):
        try:
            values[name] = check(given[name]) if name in given else None
        except DataError as error:
            raise ConfigError(f"{where}: {name} {error}") from None
    return PromptRequest(values[key], values["seed"], values["negative"])


def _check_seed(value: Any) -> int:
    try:
        seed = check_integer(value)
    except DataError:
        seed = -1
    if not 0 <= seed <= SEED_MAX:
        raise DataError(f"is {describe(value)}; expected a whole number from 0 to {SEED_MAX}")
    return seed


def _is_empty(value: Any) -> bool:
    """Return whether a value is missing: None, NaN, or a text of spaces."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())
