"""Errors that a user can cause."""


class UserError(Exception):
    """Base class of errors that a user can cause; the message is one line that says what to do about it."""


class WeightsError(UserError, ValueError):
    """A checkpoint that can't be read as asked: one line that names the file, a few keys, and what to do."""


def few(names: list[str] | tuple[str, ...], limit: int = 3) -> str:
    """The first names of a list, for a message: "a, b, c and 9 more"."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
