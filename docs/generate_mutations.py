"""Write the tables of docs/silent-bugs.md and docs/afternoon.md from tests/mutations.py and tests/online_bugs.py:
``make docs``.

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. The rest of the pages is written by hand.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.mutations import BUGS, EXERCISES, Bug, Mutation
from tests.online_bugs import ONLINE_BUGS, ONLINE_MUTATIONS, guards

DOCS = Path(__file__).parent
PAGES = ("silent-bugs.md", "afternoon.md")
REGION = re.compile(r"<!-- generated: (\S+) -->\n.*?<!-- end -->", re.S)


def document(page: str) -> str:
    """Return the page with up-to-date tables."""
    text = (DOCS / page).read_text()
    return REGION.sub(lambda found: region(found[1]), text)


def region(name: str) -> str:
    """Return the tables of a section of BUGS, of the bugs of online RL, or of the exercises."""
    if name == "exercises":
        tables = [mutations(EXERCISES)]
    elif name == "online":
        tables = [online_reports(), mutations(ONLINE_MUTATIONS, "R")]
    else:
        tables = [reports(BUGS[name]), mutations(BUGS[name])]
    return "\n\n".join([f"<!-- generated: {name} -->", *tables, "<!-- end -->"])


def reports(bugs: list[Bug]) -> str:
    """Return what went wrong, and where it was reported."""
    rows = [(str(bug.number), links(bug.reported_in), bug.title) for bug in bugs]
    return table(("#", "reported in", "what went wrong"), rows)


def online_reports() -> str:
    """Return the bugs of online RL: where each was reported, what went wrong, and its tests."""
    tests = guards()
    rows = [
        (f"R{number}", links(reported_in), title, "<br>".join(map(code, tests[number])))
        for number, (reported_in, title) in ONLINE_BUGS.items()
    ]
    return table(("#", "reported in", "what went wrong", "tests"), rows)


def mutations(changes: list[Mutation], prefix: str = "") -> str:
    """Return each line, its replacement, and the test that fails with it."""
    rows = [(f"{prefix}{m.number}", *map(code, (m.file, m.line, m.replacement, m.test))) for m in changes]
    return table(("#", "file", "line", "replacement", "test that fails"), rows)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def links(reported_in: str) -> str:
    """Return the text with each `owner/repository#number` as a link."""
    return re.sub(r"([\w.-]+/[\w.-]+)#(\d+)", r"[\1#\2](https://github.com/\1/issues/\2)", reported_in)


def code(text: str) -> str:
    escaped = text.replace("|", "\\|")
    return f"`` {escaped} ``" if "`" in text else f"`{escaped}`"


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(document(name))
