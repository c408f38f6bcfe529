"""Check the options of the data."""

import os
from pathlib import Path

from minitrain.config.aliases import MUTUALLY_EXCLUSIVE
from minitrain.config.issues import ConfigIssues
from minitrain.config.python_objects import find_object, is_lost
from minitrain.config.schema import LISTS, Config
from minitrain.config.sections import DatasetConfig
from minitrain.config.suggest import hint_for_value
from minitrain.io.paths import near_file


def check(config: Config, given: set[str], issues: ConfigIssues) -> None:
    """Add the problems of the data options to `issues`.

    Args:
        given: Names of the options that are set, or differ from their default.
    """
    _check_files(config, issues)
    _check_data(config, given, issues)


def _check_files(config: Config, issues: ConfigIssues) -> None:
    from minitrain.data.examples import ROW_FORMATS

    if not config.datasets:
        issues.add("datasets", "missing-option", "is required. Name at least one file, such as datasets=[data.jsonl].")
    for name in LISTS:
        for i, entry in enumerate(getattr(config, name)):
            key = f"{name}[{i}]"
            check_source(key, entry, issues)
            if entry.type is not None and entry.type not in ROW_FORMATS:
                hint = hint_for_value(f"{key}.type", entry.type, ROW_FORMATS)
                issues.add(
                    f"{key}.type",
                    "not-a-choice",
                    f"expected one of {', '.join(ROW_FORMATS)}, got {entry.type!r}.{hint}",
                )
            if name != "datasets" and entry.weight != 1:
                issues.add(
                    f"{key}.weight", "no-effect", "has no effect: an evaluation uses each example once. Remove it."
                )


def _check_data(config: Config, given: set[str], issues: ConfigIssues) -> None:
    for winner, loser in MUTUALLY_EXCLUSIVE:
        if winner in given and loser in given:
            issues.add(loser, "conflict", f"conflicts with {winner}. Set only one.", winner)
    if config.validation_split > 1 and config.validation_split != int(config.validation_split):
        issues.add(
            "validation_split",
            "out-of-range",
            f"expected a fraction below 1 or an integer, got {config.validation_split}.",
        )
    if config.chat_template not in ("auto", "chatml", "none"):
        try:
            Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError):
            message = f"expected auto, chatml, none or a text file, got {config.chat_template!r}."
            issues.add("chat_template", "not-found", message + hint_for_value("chat_template", config.chat_template))
    if "max_bad_rows" in given and config.on_bad_row == "error":
        issues.add("max_bad_rows", "no-effect", "has no effect without on_bad_row=skip. Set it, too.", "on_bad_row")


def check_source(key: str, entry: DatasetConfig, issues: ConfigIssues) -> None:
    """Add the problems of one entry's path to `issues`, as far as they show without reading the data."""
    from importlib.util import find_spec

    from minitrain.data.files import FORMATS, format_of
    from minitrain.data.source import is_file

    if find_object(entry.path):
        return
    if is_lost(entry.path):
        message = f"{entry.path} refers to rows given in Python. Name a file, or train from Python again."
        issues.add(f"{key}.path", "not-found", message)
        return
    path, install = Path(entry.path), "Run pip install minitrain[data]."
    if "://" in entry.path:
        issues.add(f"{key}.path", "wrong-path", f"{entry.path} is a URL. Download it, and name the file.")
        return
    if not is_file(entry):
        if (path / "config.json").is_file():
            issues.add(
                f"{key}.path", "wrong-path", f"{path} is a model directory. Name a file, or a directory of data."
            )
        elif path.is_dir() and not any(format_of(file) in FORMATS for file in path.rglob("*")):
            issues.add(f"{key}.path", "wrong-path", f"{path} has no .{', .'.join(FORMATS)} file. Name a file.")
        elif find_spec("datasets") is None:
            issues.add(f"{key}.path", "not-installed", f"needs the package datasets. {install}")
        if path.is_dir() and entry.revision:
            issues.add(f"{key}.revision", "no-effect", "has no effect on a directory. Remove it.", f"{key}.path")
        return
    if not path.exists():
        issues.add(f"{key}.path", "not-found", f"{path} does not exist (relative to {Path.cwd()}).{near_file(path)}")
    elif not path.is_file():
        issues.add(
            f"{key}.path", "wrong-path", f"{path} is a device or pipe, which cannot be read twice. Name a regular file."
        )
    elif not os.access(path, os.R_OK):
        issues.add(
            f"{key}.path", "unreadable", f"no permission to read {path}. Change its permissions, or name another file."
        )
    elif format_of(path) not in FORMATS:
        issues.add(
            f"{key}.path", "wrong-format", f"expected .{', .'.join(FORMATS)}, or such a file with .gz, got {path}."
        )
    elif format_of(path) == "parquet" and find_spec("pyarrow") is None:
        issues.add(f"{key}.path", "not-installed", f"needs the package pyarrow. {install}")
    for option in ("split", "name", "revision"):
        if getattr(entry, option) is not None:
            message = "has no effect on a file, only on a data set on the Hub or in a directory. Remove it."
            issues.add(f"{key}.{option}", "no-effect", message, f"{key}.path")
