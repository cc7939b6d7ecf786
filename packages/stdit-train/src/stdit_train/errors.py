"""Errors that a user can cause, and errors that end a run."""


class UserError(Exception):
    """Base class of errors that a user can cause; the message is one line that says what to do about it."""


class ConfigError(UserError, ValueError):
    """A setting, option or file that is missing or makes no sense; the message names it and what was expected."""


class RunEnded(UserError):
    """A run that cannot continue and has ended cleanly; the message says why and what to do."""


class CheckpointFailed(RunEnded):
    """A checkpoint could not be written; earlier ones are untouched."""


class Diverged(RunEnded):
    """Too many consecutive steps were not finite."""
