"""Writes docs/architectures.md from docs/architectures.json: ``python docs/generate_architectures.py``.

`make architectures` runs the checks and writes both.
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.architectures.outcomes import BUILT, GROUPS, OK, Outcome, Table

PAGE = Path(__file__).with_name("architectures.md")
WORDS = ("ok", "refused", "n/a", "wrong", "crash")
TITLES = {"causal": "Causal language models", "classifiers": "Classifiers and reward models"}

HEAD = """\
# Look up an architecture

```bash
minitrain validate config.yml
```

`validate` reports what your model and options need. This page has what it would say of every model type of transformers
{version}: {n_causal} types of causal language models and {n_classifiers} types of classifiers.

For each type, a tiny random model goes through the checks below. They compare logps and gradients with a plain loop
over single documents in transformers, and saved files with what transformers and PEFT load.

| outcome | meaning |
|---|---|
| ok | the numbers are equal |
| refused | `validate` and `train` stop with an error; its number is in the list of [reasons](#reasons) |
| n/a | there is nothing to compare |
| wrong, crash | a bug; please report it |

`make architectures` runs all checks in about 15 minutes, and writes this page.
`python -m tests.architectures qwen3_moe` runs them for one type.
"""


def document() -> str:
    table = Table()
    reasons = {reason: number for number, reason in enumerate(table.reasons, 1)}
    n_types = {f"n_{group}": len(table.rows[group]) for group in GROUPS}
    parts = [HEAD.format(version=table.transformers, **n_types)]
    parts += [section(group, table, reasons) for group in GROUPS]
    lines = [f"{number}. {escape(reason)}" for reason, number in reasons.items()]
    parts.append(
        "\n".join(["## Reasons", "", "`MODEL` and `TYPE` are the names of the class and the model type.", "", *lines])
    )
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def section(group: str, table: Table, reasons: dict[str, int]) -> str:
    """Return the tables of one group: checks by outcome, types without a problem, and all others."""
    rows, checks = table.rows[group], GROUPS[group].checks
    lines = [f"## {TITLES[group]}", "", "| check | what is compared | " + " | ".join(WORDS) + " |", "|---" * 7 + "|"]
    for check in checks:
        counts = Counter(outcome(row, check).word for row in rows.values())
        what = getattr(GROUPS[group].make, check).__doc__.splitlines()[0].rstrip(".")
        lines.append(f"| {check} | {what} | " + " | ".join(str(counts[word] or "") for word in WORDS) + " |")
    without, same, others = [], defaultdict(list), []
    for kind, row in rows.items():
        outcomes = [outcome(row, check) for check in checks]
        if {o.word for o in outcomes} <= {"ok", "n/a"} and OK in outcomes:
            without.append(kind)
        elif len(set(outcomes)) == 1:
            same[outcomes[0]].append(kind)
        else:
            others.append(f"| {kind} | " + " | ".join(cell(o, reasons) for o in outcomes) + " |")
    lines += ["", f"{len(without)} types pass all checks: {', '.join(without)}.", ""]
    if same:
        lines += ["| these types | have this outcome in all checks |", "|---|---|"]
        lines += [f"| {', '.join(kinds)} | {cell(o, reasons)} |" for o, kinds in same.items()] + [""]
    lines += [f"| other types | {' | '.join(checks)} |", "|---" * (len(checks) + 1) + "|", *others]
    return "\n".join(lines)


def outcome(row: dict[str, Outcome], check: str) -> Outcome:
    return row.get(BUILT, row.get(check, OK))


def cell(outcome: Outcome, reasons: dict[str, int]) -> str:
    if outcome == OK:
        return "ok"
    return f"{outcome.word} {reasons[outcome.reason]}"


def escape(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


if __name__ == "__main__":
    PAGE.write_text(document())
