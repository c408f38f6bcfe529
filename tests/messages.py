"""Problems that are reported, by their code; and the snapshot of their wording, messages.txt beside this file.

Tests assert codes, keys, files, lines and values, so that messages can be reworded freely. The words are compared with
the snapshot alone, by the fixture `wording`; `pytest --update-messages tests/...` writes those of the tests that run.
An ellipsis (…) in the snapshot stands for any text: the words of another library, a version, free memory. It is put
there by hand, and an update keeps a message that still matches.
"""

import ast
import contextlib
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from minitrain.errors import CODES

FILE = Path(__file__).with_name("messages.txt")
ROOT = Path(__file__).parents[1]
ANY = "…"


def problems(text: object) -> list[tuple[str, str]]:
    """Return (message, code) of each problem in the output of a command, or in an error."""
    found, lines = [], []
    for line in str(text).removeprefix("minitrain: ").splitlines():
        lines.append(line.strip())
        if (match := re.search(r" \[([a-z-]+)\]$", line)) and match[1] in CODES:
            found.append(("\n".join(lines)[: -len(match[0])], match[1]))
            lines = []
    return found


def reports(text: object, code: str, *parts: str) -> bool:
    """Return whether a problem with this code is reported whose message has all these parts: a key, a line, a value."""
    assert code in CODES, code
    return any(code == one and all(part in message for part in parts) for message, one in problems(text))


@contextlib.contextmanager
def raises(error: type[Exception], code: str, *parts: str) -> Iterator[pytest.ExceptionInfo]:
    """Like `pytest.raises`, for an error that reports a problem with this code and these parts in its message."""
    with pytest.raises(error) as caught:
        yield caught
    assert reports(caught.value, code, *parts), str(caught.value)


class Snapshot:
    """The messages of each test, by its id."""

    def __init__(self, update: bool, base: Path, collected: Collection[str] = ()):
        """`collected`: ids of all tests in the files that pytest has collected in full."""
        self.update, self.base, self.collected = update, base, collected
        self.known, self.written = read(), {}

    def compare(self, test: str, text: object) -> None:
        """Compare the next message of a test with the snapshot, or write it there."""
        messages = self.written.setdefault(test, [])
        messages.append(self._plain(str(text)))
        known = self.known.get(test, [])[len(messages) - 1 : len(messages)]
        matches = bool(known) and _pattern(known[0]).fullmatch(messages[-1])
        if self.update:
            messages[-1] = known[0] if matches else messages[-1]
            return
        assert known, f"messages.txt does not have this message; pytest --update-messages writes it:\n{messages[-1]}"
        assert matches, f"\nwas: {known[0]}\nnow: {messages[-1]}\npytest --update-messages takes the new wording."

    def save(self) -> None:
        if self.update:
            entries = sorted((self.known | self.written).items())
            files = {test.partition("::")[0] for test in self.collected}
            gone = {test for test, _ in entries if test.partition("::")[0] in files} - set(self.collected)
            entries = [(test, messages) for test, messages in entries if _exists(test) and test not in gone]
            FILE.write_text("\n".join(_entry(*entry) for entry in entries), encoding="utf-8")

    def _plain(self, text: str) -> str:
        """Return a text without what differs from machine to machine."""
        text = re.sub(re.escape(str(self.base)) + r"(/popen-gw\d+)?(/[\w.-]+)?", "TMP", text)
        text = text.replace(sys.executable, "PYTHON").replace(str(ROOT), "ROOT")
        text = "\n".join(line.rstrip() for line in text.strip().splitlines())
        return "".join(letter if letter.isprintable() or letter == "\n" else f"\\x{ord(letter):02x}" for letter in text)


def read() -> dict[str, list[str]]:
    """Return the messages of messages.txt by the id of their test."""
    entries: dict[str, list[str]] = {}
    text = FILE.read_text(encoding="utf-8") if FILE.exists() else ""
    for block in text.split("\n# ") if text else []:
        test, *lines = block.removeprefix("# ").splitlines()
        entries[test] = "\n".join(line[4:] for line in lines).split("\n--\n") if lines else []
    return entries


def _entry(test: str, messages: list[str]) -> str:
    lines = "\n--\n".join(messages).splitlines()
    return f"# {test}\n" + "".join(f"    {line}".rstrip() + "\n" for line in lines)


def _pattern(known: str) -> re.Pattern:
    return re.compile(".*".join(map(re.escape, known.split(ANY))), re.S)


def _exists(test: str) -> bool:
    """Return whether the function of a test is still there."""
    file, _, name = test.partition("[")[0].partition("::")
    path = ROOT / file
    return path.exists() and f"def {name.rpartition('::')[2]}(" in path.read_text()


def makes_problem(call: ast.Call, errors: set[str]) -> bool:
    """Return whether a call adds an issue, or makes one of these errors."""
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    return name in errors or (name == "add" and ast.unparse(call.func.value).endswith("issues"))


def code_argument(call: ast.Call) -> ast.expr | None:
    """Return the code in a call that makes a problem."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "code"] or call.args[1:2]
    return given[0] if given else None


def strings(node: ast.AST) -> list[str]:
    """Return the strings in an expression."""
    return [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
