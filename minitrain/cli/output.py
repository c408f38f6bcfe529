"""What --output names: a file or a folder, where it may be made, and how rows are written."""

import json
import sys
from pathlib import Path

from minitrain.errors import ConfigError, write_error_code
from minitrain.io.temp_files import new_file


def new_output(name: str | None, force: bool):
    """The path of an output, if one is named. Raises ConfigError for a place where none can be made."""
    output = Path(name) if name else None
    if output and output.is_dir():
        raise ConfigError(f"--output: {output} is a folder; name a file in it", "wrong-path")
    if output and output.exists() and not force:
        raise ConfigError(f"--output: {output} exists; choose another name or add --force", "already-exists")
    if output and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no folder {output.absolute().parent}", "not-found")
    return output


def new_rows_output(name: str | None, force: bool):
    """The same for an output of rows, which are written as JSON alone."""
    output = new_output(name, force)
    if output and output.suffix.lower() in (".csv", ".tsv", ".parquet", ".gz", ".txt", ".xlsx"):
        raise ConfigError(
            f"--output: {output}: rows are written as JSON. Use a name that ends in .jsonl or .json.", "wrong-format"
        )
    return output


def write_rows(rows: list[dict], added: list[dict], output: Path) -> str:
    """Write rows with added columns: a list into a .json file, else one row per line.

    A column keeps its own value: what would be added under its name becomes `model_NAME`. Return a remark about that.
    """
    taken, names = {key for row in rows for key in row}, {key: key for columns in added for key in columns}
    for name in names:
        while names[name] in taken:
            names[name] = f"model_{names[name]}"
    written = [row | {names[key]: value for key, value in columns.items()} for row, columns in zip(rows, added)]
    lines = list(map(_line, written))
    text = "[\n" + ",\n".join(lines) + "\n]\n" if output.suffix.lower() == ".json" else "\n".join([*lines, ""])
    try:
        with new_file(output) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written: {error.strerror}", write_error_code(error)) from None
    renamed = [f"`{name}` is in `{other}`" for name, other in names.items() if name != other]
    return f"; the rows have their own, so {', '.join(renamed)}" if renamed else ""


def _line(row: dict) -> str:
    line = json.dumps(row, ensure_ascii=False, default=str)  # str: a date in parquet
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair in some column
        return json.dumps(row, default=str)
    return line


def recover_folder(output: Path) -> None:
    """Complete the replacement of a folder that a kill interrupted, and remove what it left."""
    from minitrain.training.atomic_dir import recover, sweep

    if recover(output.parent, output.name):
        print(f"{output}: recovered; a kill had interrupted its replacement", file=sys.stderr)
    sweep(output.parent, output.name)


def refuse_folder(output: Path, force: bool) -> None:
    """Raises ConfigError for a folder that a merged model must not be written to: --force replaces models alone."""
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"--output: {above} is a file, so no folder can be made in it", "wrong-path")
    if not output.exists():
        return
    if not force:
        raise ConfigError(f"--output: {output} exists; choose another name or add --force", "already-exists")
    if not (output / "config.json").is_file():
        raise ConfigError(
            f"--output: {output} is no model's folder, and --force writes over nothing else", "already-exists"
        )
