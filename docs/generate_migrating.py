"""Write the tables of docs/migrating*.md from minitrain/config/other_tools.txt: ``make docs``.

A table is between ``<!-- generated: NAME -->`` and ``<!-- end -->``. The rest of a page is written by hand.
"""

import itertools
import re
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from minitrain.config.suggest import KeyMapping, read_tables

PAGES = sorted(Path(__file__).parent.glob("migrating*.md"))
REGION = re.compile(r"<!-- generated: (\S+) -->\n.*?<!-- end -->", re.S)
HEADER = ["| there | here | notes |", "|---|---|---|"]


def document(page: Path) -> str:
    """Return a page with up-to-date tables."""
    tables = read_tables()
    return REGION.sub(
        lambda found: "\n".join([f"<!-- generated: {found[1]} -->", *section(tables[found[1]]), "", "<!-- end -->"]),
        page.read_text(encoding="utf-8"),
    )


def section(rows: list[KeyMapping]) -> list[str]:
    """Return a table of the keys that have an option here, and a line of those that have none."""
    mapped, removed = [row for row in rows if row.options], [row for row in rows if not row.options]
    groups = itertools.groupby(mapped, key=lambda row: row.keys[0].partition("=")[0])  # rows about values of one key
    reasons = [f"{code(key.replace('=', ': ') for key in row.keys)} ({row.comment})" for row in removed]
    return [*HEADER, *(line(list(group)) for _, group in groups), "", f"Remove {'; '.join(reasons)}."]


def line(rows: list[KeyMapping]) -> str:
    """Return rows of `other_tools.txt` about one key, and perhaps some of its values, as a row of the page."""
    names = code(key.partition("=")[0] for row in rows for key in row.keys)
    notes = dict.fromkeys(row.comment for row in rows if row.comment)
    return f"| {names} | {'; '.join(map(mapping, rows))} | {'; '.join(notes)} |"


def mapping(row: KeyMapping) -> str:
    """Return the options of a row, after the values of the key that they are for."""
    values = [value for _, is_value, value in (key.partition("=") for key in row.keys) if is_value]
    ours = code(one.replace("VALUE", "...") for one in row.options)
    return f"{code(values)}: {ours}" if len(values) == len(row.keys) else ours


def code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in dict.fromkeys(words))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(document(page), encoding="utf-8")
