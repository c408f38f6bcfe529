"""Write the table of chat templates in docs/data.md: ``make docs``. It needs the package trl, whose templates it tries.

The table is between ``<!-- generated: templates -->`` and ``<!-- end -->``. The rest of the page is written by hand.
"""

import re
import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.chat_templates import CASES, Outcome, trl_templates, trl_version, try_case

PAGE = Path(__file__).with_name("data.md")
REGION = re.compile(r"<!-- generated: templates -->\n.*?<!-- end -->", re.S)
REFUSED = {"other-prompt": "other prompt", "invalid-template": "refused"}


def document() -> str:
    """Return the page with an up-to-date table."""
    return REGION.sub(lambda _: table(), PAGE.read_text())


def table() -> str:
    """Return a row for each template as models have it; revisions with the same outcome share one."""
    rows = [(name, cells(name, source)) for name, source in trl_templates().items() if not name.endswith("_training")]
    lines = [
        "<!-- generated: templates -->",
        f"| template (TRL {trl_version()}) | {' | '.join(CASES)} |",
        "|---" * (len(CASES) + 1) + "|",
    ]
    for outcome, group in groupby(rows, key=lambda row: row[1]):
        lines.append(f"| {', '.join(name for name, _ in group)} | {' | '.join(outcome)} |")
    return "\n".join([*lines, "<!-- end -->"])


def cells(name: str, source: str) -> list[str]:
    return [cell(name, source, case) for case in CASES]


def cell(name: str, source: str, case: str) -> str:
    """Return `ok`, the value of train_on that a row needs, or what the template lacks."""
    outcome = try_case(name, source, case, "all_turns")
    if is_exact(outcome):
        return "ok"
    for train_on in ("each_turn", "last_turn"):
        outcome = try_case(name, source, case, train_on)
        if is_exact(outcome):
            return train_on
    assert outcome.error
    if outcome.error.code == "lost-field":
        lost = re.search(r"leaves out or changes: (\w+)", outcome.error.message)[1]
        return f"no {lost}"
    return REFUSED[outcome.error.code]


def is_exact(outcome: Outcome) -> bool:
    return not outcome.error and not any(document.counts.get("other-prompts") for document in outcome.documents)


if __name__ == "__main__":
    if not trl_version():
        sys.exit("generate_templates.py needs the package trl: pip install -e .[dev]")
    PAGE.write_text(document())
