"""The errors that a user can fix, each with a stable code. The command line prints them without a traceback."""

import errno
from collections.abc import Iterable
from typing import NamedTuple

from minitrain.io.redact import redact

# Code of an error -> what it says. Messages may be reworded; codes stay.
CODES = {
    # the command line and the config
    "usage": "The command line, or a call from Python, has an argument that is unknown, missing or wrong.",
    "invalid-config": "The config has the problems listed below; each has a code of its own.",
    "unknown-option": "The config has no option of this name.",
    "missing-option": "An option that is needed is not set.",
    "wrong-type": "A value is of another type than the option.",
    "out-of-range": "A number is outside of the limits of the option.",
    "not-a-choice": "A value is not one of the values or names that there are.",
    "invalid-value": "A value is of the right type, but cannot be used.",
    "conflict": "Two options, or an option and the model, contradict each other.",
    "no-effect": "An option would be ignored.",
    "invalid-reference": "A ${...} in the config cannot be filled in.",
    "invalid-yaml": "The config is not valid YAML, or is not a list of keys and values.",
    # files and packages
    "not-found": "A file, a folder or a name in it does not exist.",
    "wrong-path": "A path leads to something else than what is asked for, such as a folder instead of a file.",
    "wrong-format": "A file is of a format that cannot be read or written here.",
    "unreadable": "A file exists, and cannot be read.",
    "not-writable": "A file or folder cannot be written.",
    "os-error": "The operating system refuses to read or write a file.",
    "already-exists": "An output exists and is not overwritten.",
    "not-installed": "An optional package is missing.",
    "unreachable": "A model or data set is on the hub, and the hub does not answer.",
    "plugin-failed": "The file of --plugin is not valid Python, or fails.",
    # data
    "no-data": "There are no rows, or none that can be trained on.",
    "invalid-json": "A row or a file is not valid JSON.",
    "invalid-table": "A CSV, TSV or Parquet file cannot be read as a table.",
    "invalid-row": "A row lacks a key, or has a value that cannot be used.",
    "invalid-text": "A text is not UTF-8, or has characters that the tokenizer or minitrain cannot take.",
    "no-answer": "A row has no answer to train on, or an empty one.",
    "same-answers": "The chosen and the rejected answer are the same.",
    "unsuitable-data": "Each row is valid, but the loss cannot be trained on all of them together.",
    "wrong-column": "An option names a column that the row does not have.",
    "too-large": "A row, a text, a number or a file is larger than the limit.",
    "wrong-tokens": "Examples have other tokens than they should: no end, a second beginning, nothing to train on.",
    "invalid-template": "A chat template or prompt template is wrong, or refuses the conversation.",
    # models
    "damaged-file": "A file is incomplete or its content is damaged.",
    "mismatch": "Two things do not fit each other: weights and model, adapter and model, teacher and data.",
    "unsupported-model": "The model or tokenizer is of a kind that cannot be used for this.",
    "no-device": "There is no device of this kind.",
    # runs
    "other-run": "A folder or checkpoint is of a run with other options or data.",
    "unfinished-run": "A run has no model yet.",
    "locked": "Another process uses the run folder.",
    "no-space": "The disk is full.",
    "out-of-memory": "The memory of the device or machine is full.",
    "not-finite": "A loss, gradient or weight is NaN or infinite.",
    "process-failed": "Another process of this run was killed or failed.",
}


class MinitrainError(ValueError):
    """Something the user can fix; the message says what and how.

    Attributes:
        message: The message without its code.
        code: The name of this kind of problem, one of `CODES`.
    """

    exit_code = 2

    def __init__(self, message: object, code: str):
        assert code in CODES, code
        self.message, self.code = redact(str(message)), code
        super().__init__(self.message, code)

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"

    def at(self, where: object) -> "MinitrainError":
        """Return the same error with the place before its message."""
        return type(self)(f"{where}: {self.message}", self.code)


class Issue(NamedTuple):
    """One problem of a config."""

    where: str  # file:line
    key: str
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message} [{self.code}]"


class ConfigError(MinitrainError):
    """An option is unknown, missing, of the wrong type, ignored, or contradicts another one."""

    issues: tuple[Issue, ...] = ()  # the problems of a config, when it is read


class InvalidConfigError(ConfigError):
    """All problems of a config, one line each."""

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
    """A model or a data set is on the hub, and the hub cannot be reached."""

    def __init__(self, message: object, code: str = "unreachable"):
        super().__init__(message, code)


class DataError(MinitrainError):
    """A data file or a row of it cannot be used; the message starts with ``file:line``."""


class RunError(MinitrainError):
    """The training itself failed: no finite gradient any more, a full disk."""

    exit_code = 1


class RunFolderError(RunError):
    """A run folder or a checkpoint is refused: it is damaged, or of another run. Nothing was written over."""

    exit_code = 2


def write_error_code(error: Exception) -> str:
    """Return the code for an error in writing a file."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return "no-space" if full else "not-writable"


def is_failure(error: BaseException) -> bool:
    """Whether it is an error of what was called: also a panic of Rust code, as of tokenizers, which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def short(value: object) -> str:
    """Return the beginning of a value as text, for an error message."""
    try:
        return str(value)[:60]
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
