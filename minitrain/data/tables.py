"""Read the rows of Parquet files, and of data sets on the Hub or in a directory with the package `datasets`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitrain.config.sections import DatasetConfig
from minitrain.errors import DataError
from minitrain.io.hub import is_hub_reachable, unreachable_error
from minitrain.io.redact import redact

INSTALL = "Run pip install minitrain[data]."

LabelNames = dict[str, list[str]]  # column of class indices -> class names


def read_parquet(file, path: Path) -> Iterator[tuple[int, dict | DataError]]:
    """Yield (row number from 1, row) of an open file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: needs the package pyarrow. {INSTALL}", "not-installed") from None
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
        raise DataError(f"{where}: invalid Parquet file: {_short_reason(error)} Replace it.", "invalid-table") from None


def load_table(dataset: DatasetConfig) -> Any:
    """Load a data set on the Hub or in a directory with the package `datasets`.

    A data set on the Hub is kept in the cache of `datasets`. A directory is streamed, and not cached.

    Raises:
        ConfigError: The Hub is unreachable.
        DataError: The data set cannot be loaded, or the package is missing.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"{dataset.path}: needs the package datasets. {INSTALL}", "not-installed") from None
    is_folder = Path(dataset.path).is_dir()
    if not is_folder and not is_hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True
    options = {"name": dataset.name, "split": dataset.split or "train", "revision": dataset.revision}
    try:
        return datasets.load_dataset(dataset.path, streaming=is_folder, **options)
    except Exception as error:
        message = f"{dataset.path}: cannot be read: {_short_reason(error)} Check path, name, split and revision."
        raise unreachable_error(dataset.path, error, "dataset") or DataError(message, "unreadable") from None


def rows_of(table: Any, name: str) -> Iterator[tuple[int, dict | DataError]]:
    """Yield (row number from 1, row) of a data set from `load_table`."""
    import datasets

    features = table.features or {}
    names = {key: feature.names for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    try:
        for number, row in enumerate(table, 1):
            yield number, _row(row, names)
    except Exception as error:  # each file format raises its own types
        advice = "List the files one by one if their columns differ."
        raise DataError(f"{name}: cannot be read: {_short_reason(error)} {advice}", "unreadable") from None


def _row(row: dict, names: LabelNames) -> dict | DataError:
    """Return a row of a table without empty columns, and with class names instead of indices."""
    row = _without_nulls(row)
    for key in names.keys() & row.keys():
        if not isinstance(row[key], int) or not 0 <= row[key] < len(names[key]):
            return DataError(f"{key}: expected an index into {', '.join(names[key])}, got {row[key]}", "invalid-row")
        row[key] = names[key][row[key]]
    return row


def _without_nulls(value: Any) -> Any:
    """Return a value without the keys of objects whose value is null: a table fills with null what an object lacks."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _names_in(metadata: dict[bytes, bytes]) -> LabelNames:
    """Return the class names in a Parquet file's metadata, as written by `datasets`."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return {key: feature["names"] for key, feature in features.items() if feature.get("_type") == "ClassLabel"}


def _short_reason(error: Exception) -> str:
    """Return an error's message in one line, without the usage examples that may follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return redact(" ".join(lines[:2]))[:300].rstrip(".") + "."
