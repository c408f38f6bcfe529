"""Write the sampled answers of a round as a self-contained HTML page: `minitrain rollouts RUN --html FILE`."""

import html
import itertools
from collections.abc import Sequence
from pathlib import Path

from .page import END, head, table, text
from .rollouts import Answer, content_of, is_sampled, rounds_table, select_answers, text_of_turn

STYLE = """\
.answers { display: flex; flex-wrap: wrap; gap: .75rem; }
.answer { flex: 1 1 20rem; border: 1px solid var(--line); border-left-width: 4px; border-radius: 4px; }
.answer { padding: .4rem .7rem; }
.best { border-left-color: var(--sampled); }
.worst { border-left-color: var(--bad); }
.prompt { color: var(--dim); }
.sampled { color: var(--sampled); }
.reply { color: var(--reply); }
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
    page = [head(f"{name}: {title}", STYLE), f"<h1>{text(name)}</h1>\n"]
    page += table(rounds_table(folder))
    page += [f"<h2>{text(title)}</h2>\n", "<p>", _span("prompt", "prompt"), ", ", _span("sampled", "sampled"), ", "]
    page += [_span("reply", "tool result: reply"), "</p>\n"]
    for _, answers in itertools.groupby(shown, key=lambda pair: pair[1].group):
        page += _section(list(answers))
    return "".join([*page, END])


def _section(answers: Sequence[tuple[str, Answer]]) -> list[str]:
    """Return the answers to one prompt."""
    first = answers[0][1]
    parts = ["<section>\n", f"<h3>prompt {text(first.where)}</h3>\n"]
    parts += [_turn("prompt", f"{message['role']}: {content_of(message)}") for message in first.prompt]
    parts.append('<div class="answers">\n')
    for name, answer in answers:
        kind = f" {name}" if name in ("best", "worst") else ""
        parts.append(f'<div class="answer{kind}"><b>{text(name)}</b>: {html.escape(answer.summary)}\n')
        parts += [_turn("sampled" if is_sampled(one) else "reply", text_of_turn(one)) for one in answer.messages]
        parts.append("</div>\n")
    return [*parts, "</div>\n</section>\n"]


def _turn(kind: str, content: str) -> str:
    return f'<pre class="{kind}">{text(content)}</pre>\n'


def _span(kind: str, content: str) -> str:
    return f'<span class="{kind}">{text(content)}</span>'
