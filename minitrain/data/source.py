"""Open an entry of `datasets`: a file, a directory with a data set, a data set on the Hub, or rows in Python."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minitrain.config.python_objects import find_object
from minitrain.config.sections import DatasetConfig

from .files import FORMATS, DataRow, format_of, read_rows
from .tables import load_table, rows_of

PYTHON_NAMES = ("train_dataset", "eval_dataset", "dataset", "examples")  # arguments that provide rows in Python


@dataclass
class DataSource:
    """Data rows, and bytes that identify them.

    Attributes:
        name: What messages show before the line of a row.
        size: Size in bytes.
        content: Function that yields everything that determines the rows, for a hash.
    """

    name: str
    size: int
    rows: Callable[[], Iterator[DataRow]]
    content: Callable[[], Iterator[bytes]]


def open_source(dataset: DatasetConfig) -> DataSource:
    """Return the data source of an entry.

    Raises:
        ConfigError: The Hub is unreachable.
        DataError: The data set cannot be loaded.
        OSError: The file does not exist.
    """
    if python_object := find_object(dataset.path):
        rows = python_object.value
        return DataSource(python_object.argument, rows.size, rows.read, lambda: iter([rows.digest.encode()]))
    path = Path(dataset.path)
    if is_file(dataset):
        return DataSource(dataset.path, path.stat().st_size, lambda: read_rows(path), lambda: _bytes_of([path]))
    name, table = f"{dataset.path}:{dataset.split or 'train'}", load_table(dataset)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        size = sum(file.stat().st_size for file in files)
        return DataSource(name, size, lambda: rows_of(table, name), lambda: _bytes_of(files, path))
    commit_and_split = table._fingerprint.encode()
    return DataSource(name, table.data.nbytes, lambda: rows_of(table, name), lambda: iter([commit_and_split]))


def row_name(source: str, line: int) -> str:
    """Return a row's name for messages: `file:line`, or `train_dataset[index]`."""
    return f"{source}[{line}]" if source in PYTHON_NAMES else f"{source}:{line}"


def is_file(dataset: DatasetConfig) -> bool:
    """Return whether an entry names a file: one that exists, or a path that cannot be a name on the Hub.

    A name on the Hub is `owner/name`. But data/chats is a missing file if the directory data exists and none of split,
    name and revision is set.
    """
    path = Path(dataset.path)
    if path.exists():
        return not path.is_dir()
    has_hub_options = dataset.name or dataset.split or dataset.revision
    may_be_on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset.path)
    return not may_be_on_hub or format_of(path) in (*FORMATS, "txt") or (path.parent.is_dir() and not has_hub_options)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _bytes_of(files: list[Path], folder: Path | None = None) -> Iterator[bytes]:
    """Yield the bytes of files, each preceded by its path in the folder, if any."""
    for file in files:
        if folder is not None:
            yield f"{file.relative_to(folder)} {file.stat().st_size} ".encode()
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                yield block
