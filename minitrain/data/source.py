"""What an entry of `datasets` names: a file, a folder with a data set, or one on the hub."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minitrain.config.python_objects import find_object
from minitrain.config.schema import DatasetConfig

from .files import FORMATS, Row, format_of, read_rows
from .tables import load_table, rows_of

PYTHON_NAMES = ("train_dataset", "eval_dataset", "dataset")  # of rows that are given in Python


@dataclass
class Source:
    """Rows that can be read, and how to tell whether they are the same as before."""

    name: str  # that messages put before the number of a row
    size: int  # in bytes
    rows: Callable[[], Iterator[Row]]
    content: Callable[[], Iterator[bytes]]  # all that determines the rows


def open_source(dataset: DatasetConfig) -> Source:
    """Raises ConfigError or DataError for what cannot be reached or read, OSError for a file that is not there."""
    if given := find_object(dataset.path):
        rows = given.value
        return Source(given.argument, rows.size, rows.read, lambda: iter([rows.digest.encode()]))
    path = Path(dataset.path)
    if is_file(dataset):
        return Source(dataset.path, path.stat().st_size, lambda: read_rows(path), lambda: _bytes_of([path]))
    name, table = f"{dataset.path}:{dataset.split or 'train'}", load_table(dataset)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        size = sum(file.stat().st_size for file in files)
        return Source(name, size, lambda: rows_of(table, name), lambda: _bytes_of(files, path))
    commit_and_split = table._fingerprint.encode()
    return Source(name, table.data.nbytes, lambda: rows_of(table, name), lambda: iter([commit_and_split]))


def row_name(source: str, line: int) -> str:
    """Return what messages call a row: ``file:line``, or ``train_dataset[index]``."""
    return f"{source}[{line}]" if source in PYTHON_NAMES else f"{source}:{line}"


def is_file(dataset: DatasetConfig) -> bool:
    """Whether an entry can only mean a file: one that is there, or something that is no name on the hub.

    That is `owner/name`; but data/chats is a file that is not there, if there is a folder data and nothing says split.
    """
    path = Path(dataset.path)
    if path.exists():
        return not path.is_dir()
    for_hub = dataset.name or dataset.split or dataset.revision
    shaped = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset.path)
    return not shaped or format_of(path) in (*FORMATS, "txt") or (path.parent.is_dir() and not for_hub)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _bytes_of(files: list[Path], folder: Path | None = None) -> Iterator[bytes]:
    """The bytes of files, before those of each its name in their folder."""
    for file in files:
        if folder is not None:
            yield f"{file.relative_to(folder)} {file.stat().st_size} ".encode()
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                yield block
