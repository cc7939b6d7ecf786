"""What a user can cause: every message is one line that names the file, key or value and says what to do."""

from __future__ import annotations


class UserError(Exception):
    """Base class of errors that a user can cause; the message is one line that says what to do about it."""


class DataError(UserError, ValueError):
    """A fault in what the user gave: a manifest, a setting, a file."""


class FileError(DataError, OSError):
    """A file or store that can't be opened, read or written."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or folder that does not exist."""


class ClipError(DataError):
    """A clip that can't be read or used.

    Attributes:
        path: the clip's path or URL as the dataset knows it.
        reason: why, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[ClipError], tuple[str, str]]:
        # The default would call ClipError with the joined message alone and fail to unpickle.
        return type(self), (self.path, self.reason)
