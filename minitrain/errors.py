"""The errors that a user can mend. The command line prints them as one line, without a traceback."""

from minitrain.io.redact import redact


class MinitrainError(ValueError):
    """Something the user can mend; the message says what and how."""

    exit_code = 2

    def __init__(self, message: object = ""):
        super().__init__(redact(str(message)))


class ConfigError(MinitrainError):
    """An option is unknown, missing, of the wrong type, ignored, or contradicts another one."""


class UnreachableError(ConfigError):
    """A model or a data set is on the hub, and the hub cannot be reached."""


class DataError(MinitrainError):
    """A data file or a row of it cannot be used; the message starts with ``file:line``."""


class RunError(MinitrainError):
    """The training itself failed: no finite gradient any more, a full disk."""

    exit_code = 1


class RunFolderError(RunError):
    """A run folder or a checkpoint is refused: it is damaged, or of another run. Nothing was written over."""

    exit_code = 2


def is_failure(error: BaseException) -> bool:
    """Whether it is an error of what was called: also a panic of Rust code, as of tokenizers, which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def short(value: object) -> str:
    """Return the beginning of a value as text, for an error message."""
    try:
        return str(value)[:60]
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
