"""Rows out of parquet files, and of data sets that the package `datasets` reads: on the hub, or in a folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitrain.config.schema import DatasetConfig
from minitrain.errors import DataError
from minitrain.io.hub import is_hub_reachable, unreachable_error
from minitrain.io.redact import redact

PACKAGE = "pip install minitrain[data]"  # what both need

LabelNames = dict[str, list[str]]  # column of numbers -> what they stand for


def read_parquet(file, path: Path) -> Iterator[tuple[int, dict | DataError]]:
    """Yields (number of the row from 1, row) of an open file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: the package pyarrow is not installed: {PACKAGE}", "not-installed") from None
    try:
        number = 0
        table = pyarrow.parquet.ParquetFile(file)
        names = _names_in(table.schema_arrow.metadata or {})
        for batch in table.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, _row(row, names)
    except (pyarrow.ArrowException, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        where = f"{path}:{number + 1}" if number else str(path)
        raise DataError(f"{where}: no sound parquet file: {_told(error)}", "invalid-table") from None


def load_table(dataset: DatasetConfig) -> Any:
    """A data set on the hub or in a folder, as `datasets` has it. Raises ConfigError or DataError.

    One of the hub is kept in the cache of `datasets`; a folder is read row by row, and nothing is kept.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{dataset.path}: the package datasets is not installed: {PACKAGE}", "not-installed") from None
    folder = Path(dataset.path).is_dir()
    if not folder and not is_hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True
    wanted = {"name": dataset.name, "split": dataset.split or "train", "revision": dataset.revision}
    try:
        return datasets.load_dataset(dataset.path, streaming=folder, **wanted)
    except Exception as error:
        told = f"{dataset.path}: {_told(error)}"
        raise unreachable_error(dataset.path, error, "dataset") or DataError(told, "unreadable") from None


def rows_of(table: Any, name: str) -> Iterator[tuple[int, dict | DataError]]:
    """Yields (number of the row from 1, row) of a data set of `datasets`."""
    import datasets

    features = table.features or {}
    names = {key: kind.names for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    try:
        for number, row in enumerate(table, 1):
            yield number, _row(row, names)
    except Exception as error:  # rows are read as they come, by readers of many kinds
        hint = "Files named one by one may hold rows of several kinds."
        raise DataError(f"{name}: cannot be read: {_told(error)} {hint}", "unreadable") from None


def _row(row: dict, names: LabelNames) -> dict | DataError:
    """A row of a table as that of a file: labels by name, and without the columns that it leaves empty."""
    row = {key: value for key, value in row.items() if value is not None}
    for key in names.keys() & row.keys():
        if not isinstance(row[key], int) or not 0 <= row[key] < len(names[key]):
            return DataError(f"{key} is {row[key]}, which stands for none of {', '.join(names[key])}", "invalid-row")
        row[key] = names[key][row[key]]
    return row


def _names_in(metadata: dict[bytes, bytes]) -> LabelNames:
    """Names of labels as `datasets` writes them into a parquet file."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return {key: kind["names"] for key, kind in features.items() if kind.get("_type") == "ClassLabel"}


def _told(error: Exception) -> str:
    """What an error says, in one line and without its examples of use."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return redact(" ".join(lines[:2]))[:300].rstrip(".") + "."
