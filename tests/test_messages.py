"""Codes of errors, and the snapshot of their wording."""

import pickle

import pytest

from minitrain import load_config
from minitrain.errors import ConfigError, DataError, InvalidConfigError
from tests import messages
from tests.messages import Snapshot, problems, read, reports


def test_every_issue_has_its_code(rows_file):
    """The error of a config has its issues, with line, key and code; each line of the text ends with its own code."""
    with pytest.raises(InvalidConfigError) as caught:
        load_config({"datasets": [str(rows_file)], "model": {"name_or_path": "tiny"}, "lr": -1, "sed": 1})
    assert [(issue.key, issue.code) for issue in caught.value.issues] == [
        ("lr", "out-of-range"),
        ("sed", "unknown-option"),
    ]
    assert reports(caught.value, "out-of-range", "lr: ", "-1") and reports(caught.value, "unknown-option", "sed: ")
    assert not reports(caught.value, "out-of-range", "sed: ")


def test_errors_survive_a_process():
    """Workers and ranks send them."""
    for error in (DataError("a.jsonl:1: no", "invalid-row"), ConfigError("no", "conflict").at("c.yml")):
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.code, copy.message) == (str(error), error.code, error.message)
    assert str(copy) == "c.yml: no [conflict]"
    with pytest.raises(InvalidConfigError) as caught:
        load_config({"sed": 1})
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.issues == caught.value.issues and str(copy) == str(caught.value)


def test_problems_of_a_text():
    """One in a line, several, and one in many lines; brackets that are no code."""
    assert problems("minitrain: a: b. [conflict]\n") == [("a: b.", "conflict")]
    text = "minitrain: 2 problems\n  c.yml:1: a [no]: x [usage]\n  c.yml:2: b: y\n  more [conflict]\nno [code]\n"
    assert problems(text) == [
        ("2 problems\nc.yml:1: a [no]: x", "usage"),
        ("c.yml:2: b: y\nmore", "conflict"),
    ]


def test_the_snapshot_notices_a_new_wording(tmp_path, monkeypatch):
    """An update takes it, and leaves what others wrote; an ellipsis stands for any text."""
    monkeypatch.setattr(messages, "FILE", tmp_path / "messages.txt")
    test, other = "tests/test_messages.py::test_problems_of_a_text", "tests/gone.py::test_x[a]"
    (tmp_path / "messages.txt").write_text(f"# {other}\n    a\n\n# {test}[x]\n    a\n\n    b … c\n    --\n    d\n")
    first = Snapshot(update=True, base=tmp_path)
    for text in ("a\n\nb 1.2.3 c", f"new in {tmp_path}/some0/x"):
        first.compare(f"{test}[x]", text)
    first.save()
    assert read() == {f"{test}[x]": ["a\n\nb … c", "new in TMP/x"]}
    second = Snapshot(update=False, base=tmp_path)
    second.compare(f"{test}[x]", "a\n\nb anything c")
    with pytest.raises(AssertionError, match="takes the new wording"):
        second.compare(f"{test}[x]", "newer")
    with pytest.raises(AssertionError, match="does not have this message"):
        second.compare(f"{test}[y]", "newer")
