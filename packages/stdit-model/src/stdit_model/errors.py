"""Errors that a user can cause, and helpers for their messages."""

import re


class UserError(Exception):
    """Base class of errors that a user can cause; the message is one line that says what to do about it."""


class SettingsError(UserError, ValueError):
    """A setting that is unknown, out of range, or does not fit the checkpoint."""


class WeightsError(UserError, ValueError):
    """A checkpoint that cannot be read as asked; the message names the file, a few keys, and what to do."""


class WeightsFileNotFoundError(WeightsError, FileNotFoundError):
    """A file or folder of a checkpoint or pipeline does not exist."""


class WeightsFileExistsError(WeightsError, FileExistsError):
    """A checkpoint or pipeline would overwrite what is already there."""


def few(names: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """Join the first names of a list for a message: "a, b, c and 9 more"."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def reason(error: BaseException) -> str:
    """Return why something failed in one line: what the system says, without its number, else the first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = without_numbers(str(error)).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def without_numbers(text: str) -> str:
    """Return a message without the numbers of system errors, as in "[Errno 13] Permission denied"."""
    return re.sub(r"\[(?:Errno|WinError) -?\d+\] ?| ?\(os error \d+\)", "", text)
