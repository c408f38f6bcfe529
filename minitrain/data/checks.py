"""Check the options that name data and say how to read it."""

import os
from pathlib import Path

from minitrain.config.aliases import MUTUALLY_EXCLUSIVE
from minitrain.config.issues import ConfigIssues
from minitrain.config.python_objects import find_object, is_lost
from minitrain.config.schema import Config, DatasetConfig
from minitrain.config.suggest import hint_for_value
from minitrain.io.paths import near_file


def check(config: Config, given: set[str], issues: ConfigIssues) -> None:
    """Add to `issues` what is wrong with the options of the data.

    Args:
        given: Names of the options that were written or are not at their default.
    """
    _check_files(config, issues)
    _check_data(config, given, issues)


def _check_files(config: Config, issues: ConfigIssues) -> None:
    from minitrain.data.examples import SCHEMAS

    if not config.datasets:
        issues.add(
            "datasets", "missing-option", "is missing: name at least one file, for example datasets=[data.jsonl]."
        )
    for name, entries in (("datasets", config.datasets), ("eval_datasets", config.eval_datasets)):
        for i, entry in enumerate(entries):
            key = f"{name}[{i}]"
            check_source(key, entry, issues)
            if entry.type is not None and entry.type not in SCHEMAS:
                hint = hint_for_value(f"{key}.type", entry.type, SCHEMAS)
                issues.add(f"{key}.type", "not-a-choice", f"{entry.type!r} is not one of {', '.join(SCHEMAS)}.{hint}")
            if name == "eval_datasets" and entry.weight != 1:
                issues.add(
                    f"{key}.weight", "no-effect", "has no meaning for evaluation, which sees every example once."
                )


def _check_data(config: Config, given: set[str], issues: ConfigIssues) -> None:
    for winner, loser in MUTUALLY_EXCLUSIVE:
        if winner in given and loser in given:
            issues.add(loser, "conflict", f"would be ignored beside {winner}; give one of them.", winner)
    if config.validation_split > 1 and config.validation_split != int(config.validation_split):
        issues.add("validation_split", "out-of-range", "is a share below 1 or a whole number of examples.")
    if config.chat_template not in ("auto", "chatml", "none"):
        try:
            Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError):
            told = f"{config.chat_template!r} is neither auto, chatml, none, nor a text file."
            issues.add("chat_template", "not-found", told + hint_for_value("chat_template", config.chat_template))
    if "max_bad_rows" in given and config.on_bad_row == "error":
        issues.add("max_bad_rows", "no-effect", "would be ignored: it needs on_bad_row=skip.", "on_bad_row")


def check_source(key: str, entry: DatasetConfig, issues: ConfigIssues) -> None:
    """Whether what an entry names can be read, as far as that can be seen here."""
    from importlib.util import find_spec

    from minitrain.data.files import FORMATS, format_of
    from minitrain.data.source import is_file

    if find_object(entry.path):
        return
    if is_lost(entry.path):
        message = f"{entry.path} stands for rows that were given in Python. Name a file, or train from Python again."
        issues.add(f"{key}.path", "not-found", message)
        return
    path, extra = Path(entry.path), "is not installed: pip install minitrain[data]"
    if "://" in entry.path:
        issues.add(f"{key}.path", "wrong-path", f"{entry.path} is an address; download it, and name the file.")
        return
    if not is_file(entry):
        if (path / "config.json").is_file():
            issues.add(
                f"{key}.path", "wrong-path", f"{path} is the folder of a model; name a file, or a folder of data."
            )
        elif path.is_dir() and not any(format_of(file) in FORMATS for file in path.rglob("*")):
            issues.add(
                f"{key}.path", "wrong-path", f"{path} is a folder without a .{', .'.join(FORMATS)} file; name a file."
            )
        elif find_spec("datasets") is None:
            issues.add(f"{key}.path", "not-installed", f"the package datasets, which reads it, {extra}")
        if path.is_dir() and entry.revision:
            issues.add(f"{key}.revision", "no-effect", "would be ignored: a folder has none.", f"{key}.path")
        return
    if not path.exists():
        issues.add(f"{key}.path", "not-found", f"there is no file {path} (seen from {Path.cwd()}).{near_file(path)}")
    elif not path.is_file():
        issues.add(f"{key}.path", "wrong-path", f"{path} is a device or a pipe, which cannot be read twice.")
    elif not os.access(path, os.R_OK):
        issues.add(f"{key}.path", "unreadable", f"no permission to read {path}.")
    elif format_of(path) not in FORMATS:
        issues.add(f"{key}.path", "wrong-format", f"{path} is no .{', .'.join(FORMATS)} file (.gz behind it is fine).")
    elif format_of(path) == "parquet" and find_spec("pyarrow") is None:
        issues.add(f"{key}.path", "not-installed", f"the package pyarrow, which reads it, {extra}")
    for option in ("split", "name", "revision"):
        if getattr(entry, option) is not None:
            told = "would be ignored: it is for data sets on the hub or in a folder."
            issues.add(f"{key}.{option}", "no-effect", told, f"{key}.path")
