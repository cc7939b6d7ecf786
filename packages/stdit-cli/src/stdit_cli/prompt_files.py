"""Prompts from a file: lines of text, a CSV, or JSON lines."""

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

from stdit_cli.commands.sample.request import SEED_MAX, PromptRequest

NAMES = ("prompt", "caption", "text")  # of the column or key that holds the prompt


def read_prompts(path: Path) -> list[PromptRequest]:
    """The prompts of a file, in order.

    A .txt has one a line; blank lines are skipped. A .csv has a header with a column `prompt` (or `caption`, `text`), a
    .jsonl an object with such a key, or a plain string, a line; `seed` and `negative` may stand beside it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no prompts in it, or a line that can't be read; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: no such file")
    readers = {".txt": _lines, ".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl}
    if path.suffix.lower() not in readers:
        raise ValueError(f"--prompts {path}: expected a .txt, .csv or .jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    wanted = readers[path.suffix.lower()](path, text)
    if not wanted:
        raise ValueError(f"--prompts {path}: holds no prompts")
    return wanted


def _lines(path: Path, text: str) -> list[PromptRequest]:
    return [PromptRequest(line.strip()) for line in text.splitlines() if line.strip()]


def _csv(path: Path, text: str) -> list[PromptRequest]:
    rows = csv.DictReader(StringIO(text, newline=""))  # a quoted prompt may go on on the next line
    names = {name.strip().lower(): name for name in rows.fieldnames or () if name}
    if not any(name in names for name in NAMES):
        raise ValueError(
            f"--prompts {path}: no column {' or '.join(NAMES)} in its header ({', '.join(names) or 'empty'})"
        )
    wanted = []
    for row in rows:
        if row.get(None):  # where DictReader puts what has no column
            raise ValueError(
                f"--prompts {path}, line {rows.line_num}: more values than the header has; put quotes around a prompt "
                "that has commas"
            )
        wanted.append(_wanted(path, rows.line_num, {short: row[name] for short, name in names.items()}))
    return wanted


def _jsonl(path: Path, text: str) -> list[PromptRequest]:
    wanted = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"--prompts {path}, line {number}: not JSON ({error})") from error
        wanted.append(_wanted(path, number, {"prompt": value} if isinstance(value, str) else value))
    return wanted


def _wanted(path: Path, number: int, values: Any) -> PromptRequest:
    """One prompt, from the values of a row."""
    prompt = next((values[name] for name in NAMES if values.get(name)), None) if isinstance(values, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"--prompts {path}, line {number}: no {' or '.join(NAMES)}")
    seed, negative = values.get("seed"), values.get("negative")
    try:
        seed = None if seed in (None, "") else int(seed if isinstance(seed, int) else str(seed))
    except (TypeError, ValueError):
        seed = -1
    if seed is not None and not 0 <= seed <= SEED_MAX:
        raise ValueError(
            f"--prompts {path}, line {number}: seed {values['seed']!r}: expected a whole number from 0 to {SEED_MAX}"
        )
    if negative is not None and not isinstance(negative, str):
        raise ValueError(f"--prompts {path}, line {number}: negative {negative!r}: expected text")
    return PromptRequest(prompt.strip(), seed, negative or None)
