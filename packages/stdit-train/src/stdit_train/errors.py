"""Errors that a user can cause, and the ends of runs that cannot go on."""


class UserError(Exception):
    """Base class of errors that a user can cause; the message is one line that says what to do about it."""


class ConfigError(UserError, ValueError):
    """A setting, option or file that is missing or makes no sense; the message names it and what was expected."""


class RunEnded(UserError):
    """A run that can't go on and has ended cleanly; the message says why and what to do."""


class Diverged(RunEnded):
    """Too many steps in a row were not finite."""
