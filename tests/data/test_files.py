"""Rows out of files: every format, and every way a file can be spoilt."""

import gzip
import json

import pytest

from minitrain.data import files
from minitrain.data.files import read_rows
from minitrain.errors import DataError
from tests.messages import raises, reports

ROWS = [{"prompt": "a", "response": "é ü"}, {"prompt": "b", "response": "two\nlines"}]


def written(path, data: str | bytes):
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def rows_of(path) -> list:
    return [(line, row if isinstance(row, dict) else row.code) for line, row in read_rows(path)]


CSV = 'prompt,response\na,é ü\nb,"two\nlines"\n'
TABBED = 'label\ta text\tother\r\n1\tthe "witness\t\r\n\n0\t"whole" é\u2028\t""\n1\tno third\n'
TEXTS = {
    "list.json": json.dumps(ROWS),
    "spread.json": json.dumps(ROWS, indent=2),
    "wrapped.json": json.dumps({"version": [1, {"data": 2}], "data": ROWS, "more": "x"}, indent=1),
    "rows.jsonl": "\n".join(map(json.dumps, ROWS)),
    "rows.json": "\n".join(map(json.dumps, ROWS)),
    "apart.json": "\n\n".join(map(json.dumps, ROWS)) + "\r\n \n",
    "crlf.jsonl": "\r\n".join(map(json.dumps, ROWS)) + "\r\n",
    "table.csv": CSV,
    "upper.CSV": CSV,
}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", TEXTS)
def test_formats(tmp_path, name, packed, bom):
    """Every format gives the same rows: with a byte-order mark or not, gzipped or not."""
    path = written(tmp_path / (name + packed), bom + TEXTS[name].encode())
    assert [row for _, row in read_rows(path)] == ROWS


def test_line_numbers_of_json(tmp_path):
    """An entry of a JSON list knows the line it starts on."""
    path = written(tmp_path / "a.json", '\n\n[\n  {"a": "x\\ny"},\n\n {"a":\n 2}, {"a": 3}\n]\n')
    assert [line for line, _ in rows_of(path)] == [4, 6, 7]


def test_line_numbers_of_jsonl(tmp_path):
    """Blank lines are no rows, but count as lines."""
    path = written(tmp_path / "a.jsonl", '\n{"a": 1}\n  \n\n{"a": 2}')
    assert rows_of(path) == [(2, {"a": 1}), (5, {"a": 2})]


def test_a_json_file_with_one_row_per_line(tmp_path):
    """Rows know their line, and a damaged one spoils no other, the first one included."""
    path = written(tmp_path / "a.json", '\n{"a": 1}\n\n{"a": "\u2028"}\n{"a": \n{"a": 4}\n')
    assert [row if isinstance(row, dict) else line for line, row in rows_of(path)] == [
        {"a": 1},
        {"a": "\u2028"},
        5,
        {"a": 4},
    ]
    for first in ('{"a": 1', '{"a": 1, "a": 2}', '{"a": 1} x'):
        (bad, good) = rows_of(written(tmp_path / "b.json", f'{first}\n{{"a": 2}}\n'))
        assert bad[0] == 1 and bad[1] in ("invalid-json", "invalid-text") and good == (2, {"a": 2})


def test_a_wrapped_list_of_one_row(tmp_path):
    """A row on a line of its own inside of {"data": [...]} does not make the file one with a row per line."""
    assert rows_of(written(tmp_path / "a.json", '{"data": [\n{"a": 1}\n]}')) == [(2, {"a": 1})]


def test_line_separator_inside_a_string(tmp_path):
    """U+2028 and U+0085 end no line of JSON Lines."""
    path = written(tmp_path / "a.jsonl", '{"a": "x\u2028y\x85z"}\n{"a": 2}\n')
    assert rows_of(path) == [(1, {"a": "x\u2028y\x85z"}), (2, {"a": 2})]


def test_line_numbers_of_csv(tmp_path):
    """Quotes, commas and line breaks inside fields; a row's line is the one it starts on."""
    text = 'a,b\n"say ""hi"", ok","1\n2\n3"\n\nx,y\u2028z\n"never\r\nends",4\nonly one\n5,6\n'
    path = written(tmp_path / "a.csv", text)
    assert rows_of(path) == [
        (2, {"a": 'say "hi", ok', "b": "1\n2\n3"}),
        (6, {"a": "x", "b": "y\u2028z"}),
        (7, {"a": "never\r\nends", "b": "4"}),
        (9, "invalid-row"),
        (10, {"a": "5", "b": "6"}),
    ]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("name", ["a.tsv", "a.TSV", "a.tsv.gz"])
def test_fields_between_tabs(tmp_path, name, bom):
    """Quotes are text, alone or in pairs; an empty field is one; a row that is too short is told by its line."""
    path = written(tmp_path / name, bom + TABBED.encode())
    assert rows_of(path) == [
        (2, {"label": "1", "a text": 'the "witness', "other": ""}),
        (4, {"label": "0", "a text": '"whole" é\u2028', "other": '""'}),
        (5, "invalid-row"),
    ]


def test_real_tsv(shared):
    """Every row of MRPC: 3,667 and 408, though in 226 of them a field holds an odd number of quotes."""
    for name, count in (("glue_train.tsv", 3667), ("glue_dev.tsv", 408)):
        rows = rows_of(shared("data/mrpc") / name)
        assert len(rows) == count and all(set(row) == set(rows[0][1]) for _, row in rows)
        assert list(rows[0][1]) == ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        assert {row["Quality"] for _, row in rows} == {"0", "1"}


@pytest.mark.parametrize(
    ("line", "code", "part"),
    [
        (b'{"a": "cut in the mid', "invalid-json", "column 7"),
        (b'{"a": "\xff\xfe"}', "invalid-text", "byte 7"),
        (b"[1, 2]", "invalid-row", "list"),
        (b'"text"', "invalid-row", "str"),
        (b"null", "invalid-row", "NoneType"),
        (b"{'a': 1}", "invalid-json", "column 2"),
        (b'{"a": 1} {"a": 2}', "invalid-json", "column 10"),
        (b"[" * 100_000, "invalid-json", "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid-json", "digits"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_bad_jsonl_line(tmp_path, line, code, part):
    """A line that is no row comes as an error with its reason, and the lines behind it are still read."""
    path = written(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    (_, first), (number, bad), (_, last) = read_rows(path)
    assert (first, last, number) == ({"a": 1}, {"a": 3}, 2)
    assert isinstance(bad, DataError) and reports(bad, code, part) and len(str(bad)) < 300


def test_bad_bytes_in_csv(tmp_path):
    """Bytes that are not UTF-8 spoil their own row, at its own line, though files are read in blocks."""
    path = written(tmp_path / "a.csv", b"a,b\n1,2\n3,caf\xe9\n5,6\n")
    assert rows_of(path) == [(2, {"a": "1", "b": "2"}), (3, "invalid-text"), (4, {"a": "5", "b": "6"})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_overlong_line(tmp_path, monkeypatch, name):
    """A line beyond the limit is named, and never held whole in memory."""
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1 << 20)
    path = written(tmp_path / name, b'{"a": 1}\n' + b"x" * (3 << 20))
    with raises(DataError, "too-large", f"{path}:2: ", "1 MiB"):
        rows_of(path)


@pytest.mark.parametrize(
    ("name", "text", "line", "code"),
    [
        ("a.json", '[{"a": 1},\n{"a": 2', 2, "invalid-json"),
        ("a.json", '[{"a": 1},\n{"a": 2}\n', 3, "invalid-json"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', 2, "invalid-json"),
        ("a.json", '[{"a": 1},\n]', 2, "invalid-json"),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', 2, "invalid-json"),
        ("a.json", '[\n{"a": ' + "9" * 5000 + "}]", 2, "invalid-json"),
        ("a.json", "[" * 100_000, 1, "invalid-json"),
        ("a.json", '{"rows": []}', None, "invalid-row"),
        ("a.json", '{\n"data": [\n{"a": 1},\n{"a": }]}', 4, "invalid-json"),
        ("a.json", '{"data": [{"a": 1}', 1, "invalid-json"),
        ("a.json", '"text"', None, "invalid-row"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', 2, "invalid-text"),
        ("a.csv", 'a,b\n1,2\n3,"never closed\n5,6\n', 3, "invalid-table"),
        ("a.csv", 'a,b\n"1"x,2\n', 2, "invalid-table"),
        ("a.csv", "a,b,a\n1,2,3\n", 1, "invalid-table"),
        ("a.csv", b"a,\xff\n1,2\n", 1, "invalid-text"),
        ("a.tsv", "gj04\t1\t\t\n", 1, "invalid-table"),
        ("a.tsv", b"a\t\xff\n1\t2\n", 1, "invalid-text"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_spoilt_file(tmp_path, name, text, line, code):
    """What spoils a whole file is raised with file, line and reason."""
    with raises(DataError, code, f"{tmp_path / name}{f':{line}' if line else ''}: "):
        rows_of(written(tmp_path / name, text))


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_damaged_gzip(tmp_path, damage):
    """A gzip file that was cut, damaged, or is none, is an error that names it."""
    packed = bytearray(gzip.compress(b'{"a": "some words"}\n' * 1000))
    if damage == "cut":
        packed = packed[:-20]
    elif damage == "flipped":
        packed[20:40] = bytes(20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b'{"a": 1}\n' if damage == "not gzip" else packed)
    with raises(DataError, "unreadable", "a.jsonl.gz: "):
        rows_of(path)


def test_missing_file(tmp_path):
    """A file that is not there is an error that names it."""
    with raises(DataError, "unreadable", "none.jsonl: "):
        rows_of(tmp_path / "none.jsonl")


def test_rows_come_lazily(tmp_path):
    """JSON Lines are read as they are needed, so that a first row does not wait for a large file."""
    path = written(tmp_path / "a.jsonl", '{"a": 1}\n' * 1000)
    with open(path, "rb") as file:
        next(files._read_jsonl(file, path))
        assert file.tell() < 20


def test_real_csv_and_json(shared):
    """Rows of real files: a JSON list of 999 rows, and JSON Lines with U+2028 inside a question."""
    assert len(rows_of(shared("data/llamafactory/alpaca_en_demo.json"))) == 999
    rows = rows_of(shared("data/gsm8k/train.jsonl"))
    assert len(rows) == rows[-1][0] == 7473
    assert sum(row["question"].count("\u2028") for _, row in rows) == 2
