"""What the HTML pages of runs have in common: one file, without scripts, that loads nothing from elsewhere."""

import html
from collections.abc import Sequence

from ..terminal import escape

HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
{more}<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --dim: #777; --sampled: #1a7f37; --reply: #0550ae; --bad: #cf222e; }}
@media (prefers-color-scheme: dark) {{ :root {{ --dim: #999; --sampled: #56d364; --reply: #79c0ff; --bad: #ff7b72; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .15rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }}
section {{ border-top: 1px solid var(--line); margin-top: 1.5rem; }}
pre {{ font: 13px/1.45 ui-monospace, monospace; margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
{style}</style>
</head>
<body>
"""
END = "</body>\n</html>\n"


def head(title: str, style: str = "", more: str = "") -> str:
    """Return the beginning of a page, with lines of CSS and with other elements of its head."""
    return HEAD.format(title=text(title), style=style, more=more)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table, whose first row has the names of its columns; nothing without rows."""
    if not rows:
        return []
    tags = ["th"] + ["td"] * (len(rows) - 1)
    cells = ("".join(f"<{tag}>{text(cell)}</{tag}>" for cell in row) for tag, row in zip(tags, rows, strict=True))
    return ["<table>\n", *(f"<tr>{of_row}</tr>\n" for of_row in cells), "</table>\n"]


def text(content: str) -> str:
    """Return text for a page: without characters that cannot be printed, and without markup."""
    return html.escape(escape(content))
