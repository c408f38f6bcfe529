"""Read the rows of .json, .jsonl, .csv, .tsv and .parquet files, gzipped or not, with their line numbers."""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

from minitrain.errors import DataError, short

from .tables import read_parquet

FORMATS = ("json", "jsonl", "csv", "tsv", "parquet")
MAX_LINE_BYTES = 32 << 20

DataRow = tuple[int, dict | DataError]


def format_of(path: Path) -> str:
    """Return a file's suffix in lower case and without the dot, ignoring .gz."""
    return path.name.removesuffix(".gz").rpartition(".")[2].lower()


def read_rows(path: str | Path) -> Iterator[DataRow]:
    """Yield (line number, row); for Parquet, the row number. An unreadable row is yielded as a DataError.

    Raises:
        DataError: The file cannot be read any further.
    """
    path = Path(path)
    readers = {"json": _read_json, "jsonl": _read_jsonl, "csv": _read_csv, "tsv": _read_tsv, "parquet": read_parquet}
    reader = readers[format_of(path)]
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield from reader(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}. Check the file and its permissions.", "unreadable") from None


def check_is_file(path: Path) -> None:
    """Raise DataError if the path is not a file."""
    if path.is_dir():
        raise DataError(f"{path}: is a directory. Name a file in it.", "wrong-path")
    if not path.is_file():
        raise DataError(f"{path}: does not exist (relative to {Path.cwd()}). Check the path.", "not-found")


def _lines(file, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line), without the byte-order mark and line ends."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            raise DataError(
                f"{path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB. Shorten or remove it.",
                "too-large",
            )
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        yield number, raw.rstrip(b"\r\n")


def _read_jsonl(file, path: Path) -> Iterator[DataRow]:
    for number, raw in _lines(file, path):
        if raw.strip():
            yield number, _parse(raw)


def _parse(raw: bytes) -> dict | DataError:
    try:
        row = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"invalid UTF-8 at byte {error.start} of the line", "invalid-text")
    except json.JSONDecodeError as error:
        return DataError(f"invalid JSON in column {error.colno}: {error.msg}", "invalid-json")
    except (
        RecursionError,
        ValueError,
    ) as error:  # nested too deeply, a number of thousands of digits, or a duplicate key
        return DataError(f"invalid JSON: {error}", "invalid-json")
    return as_row(row, ". Put a list of rows into a .json file" if isinstance(row, list) else "")


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Return an object as a dict. Raise ValueError for a duplicate key, of which Python would keep the last."""
    row = dict(pairs)
    if len(row) != len(pairs):
        duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate key {short(duplicate)!r}")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def as_row(row, advice: str = "") -> dict | DataError:
    """Return a decoded row if it is an object, else a DataError."""
    if isinstance(row, dict):
        return row
    return DataError(f"expected an object with keys, got {type(row).__name__} {short(row)!r}{advice}", "invalid-row")


def _read_json(file, path: Path) -> Iterator[DataRow]:
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: invalid UTF-8. Save the file as UTF-8.", "invalid-text") from None
    start = _skip(text, 0, " \t\r\n")
    wrapped = text[start : start + 1] == "{"
    if wrapped and _has_row_per_line(text):
        yield from _read_jsonl(io.BytesIO(text.encode()), path)
        return
    if wrapped:
        start = _start_of_data(text, path)
    if text[start : start + 1] != "[":
        raise DataError(f'{path}: expected a list of rows, {{"data": [...]}}, or one row per line.', "invalid-row")
    end = yield from _list_entries(text, start + 1, path)
    after = _skip(text, end, " \t\r\n")
    if after < len(text) and not wrapped:
        line = text.count("\n", 0, after) + 1
        raise DataError(f"{path}:{line}: invalid JSON: unexpected text after the list. Remove it.", "invalid-json")


def _has_row_per_line(text: str) -> bool:
    """Return whether each line holds a row: whether the first line is an object, or, if it is damaged, the second."""
    lines = [line[0].encode() for line in itertools.islice(re.finditer(r".*\S.*", text), 2)]
    objects = [isinstance(_parse(line), dict) for line in lines]
    return len(lines) == 2 and (objects[0] or (objects[1] and isinstance(_parse(text.encode()), DataError)))


def _start_of_data(text: str, path: Path) -> int:
    """Return the position of the list in `{"data": [...]}`. Raise DataError if there is none."""
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise _bad_json(path, 1, error) from None
    if not isinstance(content.get("data"), list):
        keys = ", ".join(list(content)[:5])
        raise DataError(
            f"{path}: expected a list of rows under `data`, got the keys {keys}. Write a single row as [{{...}}].",
            "invalid-row",
        )
    position = text.index("{") + 1
    while True:
        position = _skip(text, position, " \t\r\n,")
        key, position = _DECODER.raw_decode(text, position)
        position = _skip(text, position, " \t\r\n:")
        if key == "data":
            return position
        _, position = _DECODER.raw_decode(text, position)


def _list_entries(text: str, position: int, path: Path) -> Generator[DataRow, None, int]:
    """Yield (line number, row) of a list, and return the position of its end."""
    line, counted, first = 1, 0, True
    while True:
        position = _skip(text, position, " \t\r\n")
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return position + 1
        if not first:
            if text[position : position + 1] != ",":
                raise DataError(
                    f"{path}:{line}: invalid JSON: expected a comma or the end of the list.", "invalid-json"
                )
            position = _skip(text, position + 1, " \t\r\n")
            line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _bad_json(path, line, error) from None
        yield line, as_row(row)
        first = False


def _bad_json(path: Path, line: int, error: Exception) -> DataError:
    reason = getattr(error, "msg", error)
    return DataError(f"{path}:{getattr(error, 'lineno', line)}: invalid JSON: {reason}. Fix it.", "invalid-json")


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _read_csv(file, path: Path) -> Iterator[DataRow]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # Invalid UTF-8 becomes surrogates, so that it affects one row instead of the block that was read.
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="", errors="surrogateescape")
    reader = csv.reader(lines, strict=True)
    line = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        _check_header(header, path)
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield line, _csv_row(header, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: invalid CSV: {error}. Fix the row.", "invalid-table") from None


def _read_tsv(file, path: Path) -> Iterator[DataRow]:
    """Yield (line number, row) of tab-separated fields; quotes are ordinary characters (csv.QUOTE_NONE), as in GLUE."""
    header = None
    for number, raw in _lines(file, path):
        cells = raw.decode("utf-8", "surrogateescape").split("\t")
        if header is None:
            header = cells
            _check_header(header, path)
        elif raw:
            yield number, _csv_row(header, cells)


def _check_header(header: list[str], path: Path) -> None:
    if isinstance(problem := _csv_row(header, header), DataError):
        raise problem.at(f"{path}:1")
    if len(set(header)) != len(header):
        raise DataError(
            f"{path}:1: duplicate column in the header: {', '.join(header)}. Start the file with a header.",
            "invalid-table",
        )


def _csv_row(header: list[str], cells: list[str]) -> dict | DataError:
    if len(cells) != len(header):
        return DataError(f"expected {len(header)} fields as in the header, got {len(cells)}", "invalid-row")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return DataError("invalid UTF-8", "invalid-text")
    return dict(zip(header, cells, strict=True))
