"""The errors that a user can mend. The command line prints them as one line, without a traceback."""


class MinitrainError(ValueError):
    """Something the user can mend; the message says what and how."""


class ConfigError(MinitrainError):
    """An option is unknown, missing, of the wrong type, ignored, or contradicts another one."""


class DataError(MinitrainError):
    """A data file or a row of it cannot be used; the message starts with ``file:line``."""


class RunError(MinitrainError):
    """A run folder, a checkpoint or the training itself is in a state that cannot be gone on from."""
