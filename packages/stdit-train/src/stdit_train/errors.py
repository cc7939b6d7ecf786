"""What a user can get wrong, and how a run can end before its end."""


class ConfigError(ValueError):
    """A setting that does not exist or does not make sense; the message says which and what would."""


class RunEnded(Exception):
    """A run that can't go on and has ended cleanly; the message says why and what to do."""


class Diverged(RunEnded):
    """Too many steps in a row were not finite."""
