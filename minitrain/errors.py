"""Errors that a user can fix, each with a stable code. The command line prints them without a traceback."""

import errno
from collections.abc import Iterable
from typing import NamedTuple

from minitrain.io.redact import redact

# Code -> its meaning. Messages can be reworded; codes stay.
CODES = {
    # the command line and the config
    "usage": "An argument of the command line, or of a call from Python, is unknown, missing or wrong.",
    "invalid-config": "The config has the listed problems; each has its own code.",
    "unknown-option": "An option or section does not exist.",
    "missing-option": "A required option is not set.",
    "wrong-type": "A value does not have the type of its option.",
    "out-of-range": "A number is outside the limits of its option.",
    "not-a-choice": "A value is not one of the valid values or names.",
    "invalid-value": "A value has the right type, but cannot be used.",
    "conflict": "Two options, or an option and the model, contradict each other.",
    "no-effect": "An option has no effect.",
    "invalid-reference": "A ${...} in the config cannot be resolved.",
    "invalid-yaml": "The config is not valid YAML, or not a mapping of keys to values.",
    # files and packages
    "not-found": "A file, a folder or a name in a file does not exist.",
    "wrong-path": "A path is of the wrong type, such as a folder instead of a file.",
    "wrong-format": "A file has an unsupported format.",
    "unreadable": "A file exists, but cannot be read.",
    "not-writable": "A file or folder cannot be written.",
    "os-error": "The operating system cannot read or write a file.",
    "already-exists": "An output or name already exists.",
    "not-installed": "An optional package is not installed.",
    "unreachable": "The Hub with a model or dataset, or a server, is unreachable.",
    "plugin-failed": "The file of --plugin is not valid Python, or raises an error.",
    # data
    "no-data": "No data rows exist, or none has targets.",
    "invalid-json": "A data row or a file is not valid JSON.",
    "invalid-table": "A CSV, TSV or Parquet file cannot be read as a table.",
    "invalid-row": "A data row lacks a key, or has an invalid value.",
    "invalid-text": "Text is not UTF-8, or has characters that the tokenizer or minitrain does not support.",
    "no-answer": "A data row has no response to train on, or an empty one.",
    "lost-field": "The chat template leaves out a field of a data row, which would not be trained on.",
    "other-prompt": "The prompt at inference opens another response than the one in a data row, such as a thought.",
    "same-answers": "The chosen and the rejected response are the same.",
    "unsuitable-data": "The data rows are valid, but the loss cannot use them together.",
    "wrong-column": "An option names a column that a data row does not have.",
    "too-large": "A data row, a string, a number or a file exceeds a limit.",
    "wrong-tokens": "Examples have wrong tokens: no EOS, two BOS, or no targets.",
    "invalid-template": "A chat template or prompt template is invalid, or rejects a conversation.",
    # models
    "damaged-file": "A file is incomplete or corrupt.",
    "mismatch": "Two inputs do not match, such as an adapter and its model, or a teacher and the data.",
    "unsupported-model": "The model or tokenizer does not support this use.",
    "no-device": "The device does not exist.",
    # runs
    "other-run": "A folder or checkpoint is from a run with different options or data.",
    "unfinished-run": "A run has no model yet.",
    "locked": "Another process uses the run directory.",
    "no-space": "The disk is full.",
    "out-of-memory": "The device or machine ran out of memory.",
    "not-finite": "A loss, gradient or weight is NaN or infinity.",
    "process-failed": "Another process of the run failed or was killed, or a server failed.",
}


class MinitrainError(ValueError):
    """A problem that the user can fix, as its message explains.

    Attributes:
        message: The message without its code.
        code: The type of problem, one of `CODES`.
    """

    exit_code = 2

    def __init__(self, message: object, code: str):
        assert code in CODES, code
        self.message, self.code = redact(str(message)), code
        super().__init__(self.message, code)

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"

    def at(self, where: object) -> "MinitrainError":
        """Return the same error with its location in front of the message."""
        return type(self)(f"{where}: {self.message}", self.code)


class Issue(NamedTuple):
    """A problem in a config."""

    where: str  # file:line
    key: str
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message} [{self.code}]"


class ConfigError(MinitrainError):
    """An option is unknown, missing, invalid, without effect, or conflicts with another one."""

    issues: tuple[Issue, ...] = ()  # problems of a config that is read


class InvalidConfigError(ConfigError):
    """All problems in a config, one per line."""

    def __init__(self, issues: Iterable[Issue], is_complete: bool = True):
        self.issues = tuple(issue._replace(message=redact(issue.message)) for issue in issues)
        self.is_complete = is_complete
        count = "1 problem" if len(self.issues) == 1 else f"{len(self.issues)} problems"
        lines = [f"{count}{'' if is_complete else ' or more'} in the configuration", *map(str, self.issues)]
        super().__init__("\n  ".join(lines), "invalid-config")
        self.args = (self.issues, is_complete)  # for pickle

    def __str__(self) -> str:
        return self.message

    def at(self, where: object) -> "InvalidConfigError":
        issues = [issue._replace(where=f"{where}: {issue.where}") for issue in self.issues]
        return InvalidConfigError(issues, self.is_complete)


class UnreachableError(ConfigError):
    """A model or a dataset is on the Hub, and the Hub is unreachable."""

    def __init__(self, message: object, code: str = "unreachable"):
        super().__init__(message, code)


class DataError(MinitrainError):
    """A data file or a data row cannot be used; the message starts with ``file:line``."""


class RunError(MinitrainError):
    """The training failed, for example with non-finite gradients or a full disk."""

    exit_code = 1


class RunDirError(RunError):
    """A run directory or a checkpoint is damaged, or from another run. Nothing was overwritten."""

    exit_code = 2


RunFolderError = RunDirError  # the name in 0.1.0


def write_error_code(error: Exception) -> str:
    """Return the code of an error in writing a file."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return "no-space" if full else "not-writable"


def is_failure(error: BaseException) -> bool:
    """Return whether a call failed: an Exception, or a panic of Rust code (tokenizers), which is a BaseException."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def short(value: object) -> str:
    """Return the beginning of a value as a string, for an error message."""
    try:
        return str(value)[:60]
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
