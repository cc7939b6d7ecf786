"""Errors that a user can cause: each message is one line that names the file, key or value and says what to do."""

from __future__ import annotations


class UserError(Exception):
    """Base class of the errors that a user can cause. The message is one line that says what to do."""


class DataError(UserError, ValueError):
    """A manifest, setting or file is wrong."""


class FileError(DataError, OSError):
    """A file or store can't be opened, read or written."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or folder does not exist."""


class StoreError(FileError):
    """A store can't be used now: it does not answer, or its package is not installed. It says nothing of a file."""


class ClipError(DataError):
    """A clip can't be read or used.

    Attributes:
        path: path or URL of the clip.
        reason: the reason, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[ClipError], tuple[str, str]]:
        # The default would call ClipError with the joined message alone and fail to unpickle.
        return type(self), (self.path, self.reason)
