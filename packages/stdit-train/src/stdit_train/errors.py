"""What a user can get wrong."""


class ConfigError(ValueError):
    """A setting that does not exist or does not make sense; the message says which and what would."""
