"""Check what --output names, and write it."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from minitrain.errors import ConfigError, MinitrainError, write_error_code
from minitrain.io.redact import redact
from minitrain.io.temp_files import new_file


def print_info(arguments: argparse.Namespace, line: str) -> None:
    """Print a line that is not a result, unless --quiet is set."""
    if not arguments.quiet:
        print(line, flush=True)


def print_json(value: Any) -> None:
    """Print a result as JSON, without secrets. Numbers that JSON lacks are strings, as in metrics.jsonl."""
    print(redact(json.dumps(_plain(value), indent=2, ensure_ascii=False, default=str, skipkeys=True)), flush=True)


def _plain(value: Any) -> Any:
    """Return a result with strings for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def error_json(error: MinitrainError) -> dict[str, Any]:
    """Return an error as the JSON of a command: its code and message, and the issues of a config."""
    issues = [issue._asdict() for issue in error.issues] if isinstance(error, ConfigError) else []
    return {"code": error.code, "message": error.message} | ({"issues": issues} if issues else {})


def new_output(name: str | None, force: bool, option: str = "--output") -> Path | None:
    """Return the path of an output file, if an option names one. Raise ConfigError if it cannot be created."""
    output = Path(name) if name else None
    if output and output.is_dir():
        raise ConfigError(f"{option}: {output} is a folder. Name a file in it.", "wrong-path")
    if output and output.exists() and not force:
        raise _exists(output, option)
    if output and not output.absolute().parent.is_dir():
        raise ConfigError(f"{option}: folder {output.absolute().parent} does not exist. Create it first.", "not-found")
    return output


def write_output(text: str, output: Path, option: str = "--output") -> None:
    """Write an output file. Raise ConfigError if that fails."""
    try:
        with new_file(output) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option}: {output} cannot be written: {error.strerror}", write_error_code(error)) from None


def new_rows_output(name: str | None, force: bool) -> Path | None:
    """Return the path of an output file of rows, which must be JSON. Raise ConfigError as `new_output` does."""
    output = new_output(name, force)
    if output and output.suffix.lower() in (".csv", ".tsv", ".parquet", ".gz", ".txt", ".xlsx"):
        raise ConfigError(
            f"--output: expected a .jsonl or .json file, got {output}. Rows are written as JSON; rename the output.",
            "wrong-format",
        )
    return output


def write_rows(rows: list[dict], new_columns: list[dict], output: Path) -> str:
    """Write rows with new columns: a JSON list to a .json file, otherwise one row per line.

    Rows keep their own columns: a new column of the same name is written as `model_NAME`.

    Args:
        rows: The rows.
        new_columns: The new columns of each row.
        output: The file.

    Returns:
        A remark about renamed columns, or an empty string.
    """
    taken, names = {key for row in rows for key in row}, {key: key for columns in new_columns for key in columns}
    for name in names:
        while names[name] in taken:
            names[name] = f"model_{names[name]}"
    merged = [row | {names[key]: value for key, value in columns.items()} for row, columns in zip(rows, new_columns)]
    lines = list(map(_line, merged))
    text = "[\n" + ",\n".join(lines) + "\n]\n" if output.suffix.lower() == ".json" else "\n".join([*lines, ""])
    write_output(text, output)
    renamed = [f"`{name}` is saved as `{other}`" for name, other in names.items() if name != other]
    return f"; the rows have a column of that name, so {', '.join(renamed)}" if renamed else ""


def _line(row: dict) -> str:
    line = json.dumps(row, ensure_ascii=False, default=str)  # str: a date in parquet
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair in some column
        return json.dumps(row, default=str)
    return line


def recover_folder(output: Path) -> None:
    """Complete the replacement of a folder that a kill interrupted, and remove its temporary files."""
    from minitrain.training.atomic_dir import recover, remove_leftovers

    if recover(output.parent, output.name):
        print(f"{output}: recovered after an interrupted replacement", file=sys.stderr)
    remove_leftovers(output.parent, output.name)


def check_new_folder(output: Path, force: bool) -> None:
    """Raise ConfigError for a folder that cannot be created or replaced; --force replaces only folders of models."""
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ConfigError(f"--output: {parent} is a file, not a folder. Choose another path.", "wrong-path")
    if not output.exists():
        return
    if not force:
        raise _exists(output)
    if not (output / "config.json").is_file():
        raise ConfigError(
            f"--output: {output} is not a model folder, and --force replaces nothing else. Choose another path.",
            "already-exists",
        )


def _exists(output: Path, option: str = "--output") -> ConfigError:
    return ConfigError(f"{option}: {output} already exists. Choose another name or add --force.", "already-exists")
