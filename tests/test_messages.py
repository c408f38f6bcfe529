"""Codes of errors, and the snapshot of their wording."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from minitrain import errors, load_config
from minitrain.errors import CODES, ConfigError, DataError, InvalidConfigError, MinitrainError, UnreachableError
from tests import messages
from tests.messages import Snapshot, code_argument, makes_problem, problems, read, reports, strings

FAMILY = {
    name
    for name, one in vars(errors).items()
    if isinstance(one, type) and issubclass(one, MinitrainError) and one not in (InvalidConfigError, UnreachableError)
} | {"_InvalidValue"}


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
    """An update takes it, leaves what others wrote, and drops tests that are gone; an ellipsis stands for any text."""
    monkeypatch.setattr(messages, "FILE", tmp_path / "messages.txt")
    test, other = "tests/test_messages.py::test_problems_of_a_text", "tests/gone.py::test_x[a]"
    (tmp_path / "messages.txt").write_text(f"# {other}\n    a\n\n# {test}[x]\n    a\n\n    b … c\n    --\n    d\n")
    gone, partial = f"{test}[gone]", "tests/test_docs.py::test_links_in_the_documents_lead_somewhere[x]"
    more = "".join(f"\n# {each}\n    a\n" for each in (gone, partial))
    (tmp_path / "messages.txt").write_text((tmp_path / "messages.txt").read_text() + more)
    first = Snapshot(update=True, base=tmp_path, collected=[f"{test}[x]"])
    for text in ("a\n\nb 1.2.3 c", f"new in {tmp_path}/some0/x"):
        first.compare(f"{test}[x]", text)
    first.save()
    assert read() == {partial: ["a"], f"{test}[x]": ["a\n\nb … c", "new in TMP/x"]}
    second = Snapshot(update=False, base=tmp_path)
    second.compare(f"{test}[x]", "a\n\nb anything c")
    with pytest.raises(AssertionError, match="takes the new wording"):
        second.compare(f"{test}[x]", "newer")
    with pytest.raises(AssertionError, match="does not have this message"):
        second.compare(f"{test}[y]", "newer")


def trees() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(Path(errors.__file__).parent.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def code_arguments() -> Iterator[tuple[str, list[str] | None]]:
    """Yield file:line of each error or issue that the library makes, and its code as it may be; None if it has none."""
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and makes_problem(node, FAMILY):
                code = code_argument(node)
                yield f"{path}:{node.lineno}", None if code is None else strings(code)


def test_every_problem_has_a_code():
    """Each error and issue that the library makes has one of CODES, or the code of another error."""
    found = list(code_arguments())
    assert len(found) > 300
    assert [where for where, codes in found if codes is None or set(codes) - set(CODES)] == []


def test_every_code_is_in_use():
    """Each is somewhere in the library besides its own line in CODES."""
    used = set()
    for _, tree in trees():
        tree.body = [node for node in tree.body if not ast.unparse(node).startswith("CODES = ")]
        used.update(strings(tree))
    assert set(CODES) - used == set()
