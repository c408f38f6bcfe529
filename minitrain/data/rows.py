"""Rows that are given in Python, read as if they stood in a file of JSON lines."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minitrain.config.python_objects import PythonObject, python_object
from minitrain.errors import ConfigError, DataError

from .files import Row, as_row

HOW = "Give a list of dicts, a datasets.Dataset, or another collection of rows that has a length"


@dataclass
class PythonRows:
    """A collection of rows, and what `rows_object` found out about it.

    Attributes:
        size: Bytes of the rows as JSON.
        digest: A hash of the rows, in hexadecimal.
    """

    rows: Any
    size: int
    digest: str

    def read(self) -> Iterator[Row]:
        """Yield (index, row); a row that JSON cannot hold comes as a DataError."""
        for index, row in enumerate(_each(self.rows)):
            try:
                yield index, as_row(json.loads(_as_json(row)))
            except (TypeError, ValueError, RecursionError) as error:
                yield index, DataError(f"not usable as JSON: {error}", "invalid-json")


def rows_object(rows: Any, argument: str) -> PythonObject:
    """Return rows as an object that a config can name. Raises ConfigError for what is not a collection of rows.

    Args:
        argument: What messages call them, such as `train_dataset`.
    """
    _check_rows(rows, argument)
    size, hasher = 0, hashlib.sha256()
    for line in _lines(rows):
        size += len(line)
        hasher.update(line)
    digest = hasher.hexdigest()
    kind = "list" if isinstance(rows, list) else type(rows).__name__
    text = f"{argument}, {kind} of {len(rows):,} rows, sha256 {digest[:16]}"
    return python_object(PythonRows(rows, size, digest), argument, text)


def _lines(rows: Any) -> Iterator[bytes]:
    """Yield what determines each row."""
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
    """Return numbers and arrays of NumPy and PyTorch as Python has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value is of type {type(value).__name__}")


def _check_rows(rows: Any, argument: str) -> None:
    if isinstance(rows, (str, bytes)) or hasattr(rows, "__fspath__"):
        option = "eval_datasets" if argument == "eval_dataset" else "datasets"
        raise ConfigError(f"{argument}: expected rows, got {rows!r}. Name files in the config: {option}.", "wrong-type")
    if isinstance(rows, Mapping):
        splits = " Choose a split of it." if type(rows).__name__.startswith(("DatasetDict", "Iterable")) else ""
        raise ConfigError(f"{argument}: expected rows, got {type(rows).__name__}.{splits} {HOW}.", "wrong-type")
    if hasattr(rows, "to_dict") and hasattr(rows, "iloc"):
        raise ConfigError(f"{argument}: got a {type(rows).__name__}. Give its to_dict('records').", "wrong-type")
    if not hasattr(rows, "__len__") or not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
        raise ConfigError(f"{argument}: expected rows, got {type(rows).__name__}. {HOW}.", "wrong-type")
    if len(rows) == 0:
        raise ConfigError(f"{argument}: has no rows.", "no-data")
