"""Write the sampled answers of a round as a self-contained HTML page: `minitrain rollouts RUN --html FILE`."""

import html
import itertools
from collections.abc import Sequence
from pathlib import Path

from ..terminal import escape
from .rollouts import Answer, content_of, is_sampled, rounds_table, select_answers, text_of_turn

HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --dim: #777; --sampled: #1a7f37; --reply: #0550ae; --bad: #cf222e; }}
@media (prefers-color-scheme: dark) {{ :root {{ --dim: #999; --sampled: #56d364; --reply: #79c0ff; --bad: #ff7b72; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .15rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }}
section {{ border-top: 1px solid var(--line); margin-top: 1.5rem; }}
pre {{ font: 13px/1.45 ui-monospace, monospace; margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
.answers {{ display: flex; flex-wrap: wrap; gap: .75rem; }}
.answer {{ flex: 1 1 20rem; border: 1px solid var(--line); border-left-width: 4px; border-radius: 4px; }}
.answer {{ padding: .4rem .7rem; }}
.best {{ border-left-color: var(--sampled); }}
.worst {{ border-left-color: var(--bad); }}
.prompt {{ color: var(--dim); }}
.sampled {{ color: var(--sampled); }}
.reply {{ color: var(--reply); }}
</style>
</head>
<body>
"""


def rollouts_page(
    folder: Path, number: int | None = None, order: str | None = None, line: int | None = None, n: int | None = None
) -> str:
    """Return a page with the table of rounds and the answers of a round, those to a prompt side by side.

    The arguments are those of `show_answers`, which shows fewer answers by default.

    Raises:
        ConfigError: The folder has no answers of the round or to the prompt.
    """
    title, shown = select_answers(folder, number, order, line, n, complete=True)
    name = folder.resolve().name
    page = [HEAD.format(title=_text(f"{name}: {title}")), f"<h1>{_text(name)}</h1>\n"]
    page += _table(rounds_table(folder))
    page += [f"<h2>{_text(title)}</h2>\n", "<p>", _span("prompt", "prompt"), ", ", _span("sampled", "sampled"), ", "]
    page += [_span("reply", "tool result: reply"), "</p>\n"]
    for _, answers in itertools.groupby(shown, key=lambda pair: pair[1].group):
        page += _section(list(answers))
    return "".join([*page, "</body>\n</html>\n"])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    tags = ["th"] + ["td"] * (len(rows) - 1)
    cells = ("".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row) for tag, row in zip(tags, rows, strict=True))
    return ["<table>\n", *(f"<tr>{of_row}</tr>\n" for of_row in cells), "</table>\n"]


def _section(answers: Sequence[tuple[str, Answer]]) -> list[str]:
    """Return the answers to one prompt."""
    first = answers[0][1]
    parts = ["<section>\n", f"<h3>prompt {_text(first.where)}</h3>\n"]
    parts += [_turn("prompt", f"{message['role']}: {content_of(message)}") for message in first.prompt]
    parts.append('<div class="answers">\n')
    for name, answer in answers:
        kind = f" {name}" if name in ("best", "worst") else ""
        parts.append(f'<div class="answer{kind}"><b>{_text(name)}</b>: {html.escape(answer.summary)}\n')
        parts += [_turn("sampled" if is_sampled(one) else "reply", text_of_turn(one)) for one in answer.messages]
        parts.append("</div>\n")
    return [*parts, "</div>\n</section>\n"]


def _turn(kind: str, text: str) -> str:
    return f'<pre class="{kind}">{_text(text)}</pre>\n'


def _span(kind: str, text: str) -> str:
    return f'<span class="{kind}">{_text(text)}</span>'


def _text(text: str) -> str:
    """Return text for a page: without characters that cannot be printed, and without markup."""
    return html.escape(escape(text))
