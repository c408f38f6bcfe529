"""Rows out of .json, .jsonl, .csv, .tsv and .parquet files, gzipped or not, each with the line it starts on."""

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

Row = tuple[int, dict | DataError]


def format_of(path: Path) -> str:
    """The last part of a file's name, that of gzip aside."""
    return path.name.removesuffix(".gz").rpartition(".")[2].lower()


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yields (line number, row), of a parquet file the row's own number. A row that cannot be read comes as a
    DataError in place of the dict, so that the caller decides whether to go on; what spoils the whole file is raised.
    """
    path = Path(path)
    readers = {"json": _read_json, "jsonl": _read_jsonl, "csv": _read_csv, "tsv": _read_tsv, "parquet": read_parquet}
    reader = readers[format_of(path)]
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield from reader(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}", "unreadable") from None


def refuse_no_file(path: Path) -> None:
    """Raises DataError when there is no file to read."""
    if path.is_dir():
        raise DataError(f"{path}: this is a folder; name a file in it", "wrong-path")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file (seen from {Path.cwd()})", "not-found")


def _lines(file, path: Path) -> Iterator[tuple[int, bytes]]:
    """Line by line, without the byte-order mark and the ends of the lines."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            raise DataError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES >> 20} MiB", "too-large")
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        yield number, raw.rstrip(b"\r\n")


def _read_jsonl(file, path: Path) -> Iterator[Row]:
    for number, raw in _lines(file, path):
        if raw.strip():
            yield number, _parse(raw)


def _parse(raw: bytes) -> dict | DataError:
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 text (byte {error.start} of the line)", "invalid-text")
    except json.JSONDecodeError as error:
        return DataError(f"not valid JSON: {error.msg} (column {error.colno})", "invalid-json")
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        return DataError(f"not usable JSON: {error}", "invalid-json")
    return as_row(row)


def _object(pairs: list[tuple[str, object]]) -> dict:
    """Raises ValueError for a key that is there twice, of which Python would take the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {short(twice)!r} is there twice")
    return made


def as_row(row) -> dict | DataError:
    """Return a decoded row if it is an object, else what is wrong with it."""
    if isinstance(row, dict):
        return row
    hint = "; a list of rows belongs in a .json file" if isinstance(row, list) else ""
    return DataError(f"expected an object with keys, got {type(row).__name__} {short(row)!r}{hint}", "invalid-row")


def _read_json(file, path: Path) -> Iterator[Row]:
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text", "invalid-text") from None
    start = _skip(text, 0, " \t\r\n")
    wrapped = text[start : start + 1] == "{"
    if wrapped and _has_row_per_line(text):
        yield from _read_jsonl(io.BytesIO(text.encode()), path)
        return
    if wrapped:
        start = _start_of_data(text, path)
    if text[start : start + 1] != "[":
        raise DataError(f'{path}: expected a list of rows, {{"data": [...]}}, or one row per line', "invalid-row")
    end = yield from _list_entries(text, start + 1, path)
    after = _skip(text, end, " \t\r\n")
    if after < len(text) and not wrapped:
        line = text.count("\n", 0, after) + 1
        raise DataError(f"{path}:{line}: not valid JSON: there is more behind the list", "invalid-json")


def _has_row_per_line(text: str) -> bool:
    """Return whether the first of several lines is an object; or the second, because the first may be damaged."""
    lines = [line[0].encode() for line in itertools.islice(re.finditer(r".*\S.*", text), 2)]
    objects = [isinstance(_parse(line), dict) for line in lines]
    return len(lines) == 2 and (objects[0] or (objects[1] and isinstance(_parse(text.encode()), DataError)))


def _start_of_data(text: str, path: Path) -> int:
    """Return where the list of `{"data": [...]}` opens. Raises DataError."""
    try:
        whole = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise _bad_json(path, 1, error) from None
    if not isinstance(whole.get("data"), list):
        keys = ", ".join(list(whole)[:5])
        raise DataError(
            f"{path}: expected a list of rows under `data`, found the keys {keys}; write one row as [{{...}}]",
            "invalid-row",
        )
    decoder, position = json.JSONDecoder(object_pairs_hook=_object), text.index("{") + 1
    while True:
        position = _skip(text, position, " \t\r\n,")
        key, position = decoder.raw_decode(text, position)
        position = _skip(text, position, " \t\r\n:")
        if key == "data":
            return position
        _, position = decoder.raw_decode(text, position)


def _list_entries(text: str, position: int, path: Path) -> Generator[Row, None, int]:
    """Decodes one entry at a time, so that each row knows its line; returns where the list ends."""
    decoder, line, counted, first = json.JSONDecoder(object_pairs_hook=_object), 1, 0, True
    while True:
        position = _skip(text, position, " \t\r\n")
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return position + 1
        if not first:
            if text[position : position + 1] != ",":
                raise DataError(
                    f"{path}:{line}: not valid JSON: expected a comma or the end of the list", "invalid-json"
                )
            position = _skip(text, position + 1, " \t\r\n")
            line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _bad_json(path, line, error) from None
        yield line, as_row(row)
        first = False


def _bad_json(path: Path, line: int, error: Exception) -> DataError:
    return DataError(
        f"{path}:{getattr(error, 'lineno', line)}: not valid JSON: {getattr(error, 'msg', error)}", "invalid-json"
    )


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _read_csv(file, path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # Bytes that are not UTF-8 become surrogates, so that they spoil their row and not the block they were read in.
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
        raise DataError(f"{path}:{line}: not valid CSV: {error}", "invalid-table") from None


def _read_tsv(file, path: Path) -> Iterator[Row]:
    """Fields between tabs, with a header; quotes are text like any other (csv.QUOTE_NONE), as in GLUE."""
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
        told = "The first line has to name the columns; a file without a header cannot be read."
        raise DataError(
            f"{path}:1: a column name stands twice in the header: {', '.join(header)}. {told}", "invalid-table"
        )


def _csv_row(header: list[str], cells: list[str]) -> dict | DataError:
    if len(cells) != len(header):
        return DataError(f"{len(cells)} fields where the header has {len(header)}", "invalid-row")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return DataError("not UTF-8 text", "invalid-text")
    return dict(zip(header, cells, strict=True))
