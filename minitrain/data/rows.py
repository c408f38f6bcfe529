"""Read rows that are given in Python as if they were a JSON Lines file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minitrain.config.python_objects import PythonObject, python_object
from minitrain.errors import ConfigError, DataError

from .files import DataRow, as_row

ADVICE = "Provide a list of dicts, a datasets.Dataset, or another collection of rows with a length."


@dataclass
class PythonRows:
    """A collection of rows.

    Attributes:
        size: Size of the rows as JSON, in bytes.
        digest: SHA-256 of the rows, in hexadecimal.
    """

    rows: Any
    size: int
    digest: str

    def read(self) -> Iterator[DataRow]:
        """Yield (index, row). A row that cannot be converted to JSON is yielded as a DataError."""
        for index, row in enumerate(_each(self.rows)):
            try:
                yield index, as_row(json.loads(_as_json(row)))
            except (TypeError, ValueError, RecursionError) as error:
                yield index, DataError(f"cannot be converted to JSON: {error}", "invalid-json")


def rows_object(rows: Any, argument: str) -> PythonObject:
    """Return rows as an object that a config can refer to.

    Args:
        argument: Name of the argument with the rows, such as `train_dataset`, for messages.

    Raises:
        ConfigError: The rows are not a collection with a length, or are empty.
    """
    _check_rows(rows, argument)
    size, hasher = 0, hashlib.sha256()
    for line in _lines(rows):
        size += len(line)
        hasher.update(line)
    digest = hasher.hexdigest()
    type_name = "list" if isinstance(rows, list) else type(rows).__name__
    description = f"{argument}, {type_name} of {len(rows):,} rows, sha256 {digest[:16]}"
    return python_object(PythonRows(rows, size, digest), argument, description)


def _lines(rows: Any) -> Iterator[bytes]:
    """Yield the rows as JSON lines; a row that cannot be converted, as the name of its type."""
    for row in _each(rows):
        try:
            yield _as_json(row).encode() + b"\n"
        except (TypeError, ValueError, RecursionError):
            yield f"{type(row).__name__}\n".encode()


def _each(rows: Any) -> Iterator[Any]:
    return iter(rows) if hasattr(rows, "__iter__") else (rows[index] for index in range(len(rows)))


def _as_json(row: Any) -> str:
    return json.dumps(
        row if isinstance(row, (dict, list)) or not isinstance(row, Mapping) else dict(row), default=_plain
    )


def _plain(value: Any) -> Any:
    """Convert numbers and arrays of NumPy and PyTorch to Python objects."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"value of type {type(value).__name__}")


def _check_rows(rows: Any, argument: str) -> None:
    if isinstance(rows, (str, bytes)) or hasattr(rows, "__fspath__"):
        option = {"train_dataset": "datasets", "eval_dataset": "eval_datasets"}.get(argument)
        advice = f"Name files in the config: {option}." if option else "Read the file into a list of dicts."
        raise ConfigError(f"{argument}: expected rows, got {rows!r}. {advice}", "wrong-type")
    if isinstance(rows, Mapping):
        splits = " Choose a split of it." if type(rows).__name__.startswith(("DatasetDict", "Iterable")) else ""
        raise ConfigError(f"{argument}: expected rows, got {type(rows).__name__}.{splits} {ADVICE}", "wrong-type")
    if hasattr(rows, "to_dict") and hasattr(rows, "iloc"):
        raise ConfigError(
            f"{argument}: expected rows, got {type(rows).__name__}. Provide its to_dict('records').", "wrong-type"
        )
    if not hasattr(rows, "__len__") or not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
        raise ConfigError(f"{argument}: expected rows, got {type(rows).__name__}. {ADVICE}", "wrong-type")
    if len(rows) == 0:
        raise ConfigError(f"{argument}: has no rows. Provide at least one.", "no-data")
