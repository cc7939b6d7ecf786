"""What a user can get wrong, and how a run can end before its end."""


class UserError(Exception):
    """Base class of errors that a user can cause; the message is one line that says what to do about it."""


class ConfigError(UserError, ValueError):
    """A setting that does not exist or does not make sense; the message says which and what would."""


class RunEnded(UserError):
    """A run that can't go on and has ended cleanly; the message says why and what to do."""


class Diverged(RunEnded):
    """Too many steps in a row were not finite."""
