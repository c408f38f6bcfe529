"""Write the plot of runs as an HTML page in one file, with metrics, samples and diagnosis: `minitrain plot --html`."""

import base64
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from minitrain.errors import ConfigError, write_error_code
from minitrain.io.redact import redact
from minitrain.io.temp_files import new_file
from minitrain.training.metrics_log import KINDS, SAMPLES, UNREADABLE, History, parse_line

from .doctor import report
from .page import END, head, table, text
from .plot import describe_runs, panel_names, run_names
from .rollouts import saved_rounds, select_answers, text_of_turn

N_STEPS = 6  # most columns of a table
LONGEST = 600  # characters of a sample
SHOWN_OPTIONS = ("model.name_or_path", "loss.name", "lr", "total_batch_size", "lora.rank", "model.quantization")
STYLE = """\
img { max-width: 100%; background: white; border-radius: 4px; }
.scroll { overflow-x: auto; }
.dim { color: var(--dim); }
th, td { vertical-align: top; }
th:first-child, td:first-child, .samples td, .samples th { text-align: left; }
.samples td { min-width: 8rem; max-width: 26rem; }
.right { color: var(--sampled); }
.wrong { color: var(--bad); }
"""


def write_page(histories: list[History], picture: Path, file: Path, force: bool, refresh: float | None = None) -> None:
    """Write the page.

    Args:
        picture: The PNG of `plot`, which the page contains.
        force: Overwrite any file; without it only a page of the same runs is overwritten.
        refresh: Seconds after which a browser reloads the page; None for a page that does not change.

    Raises:
        ConfigError: `file` cannot be written or is another file.
    """
    marker = f'<meta name="description" content="{text(describe_runs(histories))}">\n'
    try:
        if file.exists() and not force and marker not in file.read_text(encoding="utf-8", errors="replace"):
            raise ConfigError(
                f"--html: {file} already exists and is not a page of these runs. Move it or add --force.",
                "already-exists",
            )
        if refresh is not None:
            marker += f'<meta http-equiv="refresh" content="{refresh:g}">\n'
        with new_file(file) as new:
            new.write_text(_page(histories, picture.read_bytes(), marker), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html: {file} cannot be written: {error.strerror}", write_error_code(error)) from None


def is_finished(history: History) -> bool:
    """Return whether a run has reached its end. A longer one may continue in the same directory."""
    return history.end is not None and history.last_step <= history.end[0]


def _page(histories: list[History], picture: bytes, more: str) -> str:
    names = run_names(histories)
    title, encoded = ", ".join(names), base64.b64encode(picture).decode()
    page = [head(title, STYLE, more), f"<h1>{text(title)}</h1>\n"]
    headings = [f"{name}: " if len(names) > 1 else "" for name in names]
    for heading, history in zip(headings, histories):
        page.append(f'<p>{text(heading + _status(history))} <span class="dim">{text(_options(history))}</span></p>\n')
    page.append(f'<img alt="The metrics of {text(title)} by step" src="data:image/png;base64,{encoded}">\n')
    for heading, history in zip(headings, histories):
        page += ["<section>\n", f"<h2>{text(heading.removesuffix(': '))}</h2>\n" if heading else ""]
        page += ["<h3>Metrics</h3>\n", *_scrolling(table(_metrics(history)))]
        for kind, rows in (("Samples", _samples(history.folder)), ("Sampled answers", _answers(history.folder))):
            if rows:
                page += [f"<h3>{kind}</h3>\n", *_scrolling(_samples_table(rows))]
        page.append(f"<h3>Diagnosis</h3>\n<pre>{_lines(report(history))}</pre>\n</section>\n")
    page.append(f'<p class="dim">written at {time.strftime("%Y-%m-%d %H:%M:%S")}</p>\n')
    return "".join([*page, END])


def _lines(content: str) -> str:
    """Return lines for a page, whose ends are not marked."""
    return "\n".join(map(text, content.split("\n")))


def _scrolling(parts: Iterable[str]) -> list[str]:
    return ['<div class="scroll">\n', *parts, "</div>\n"]


def _status(history: History) -> str:
    if is_finished(history):
        last, planned = history.end
        return f"Finished at step {last:,}" + (f" of {planned:,}." if last < planned else ".")
    remaining = history.values("train/eta_seconds")[-1:]
    ends = f", {timedelta(seconds=round(remaining[0]))} remaining" if remaining else ""
    return f"Step {history.last_step:,}{ends}."


def _options(history: History) -> str:
    values = {key: history.setting(key, object) for key in SHOWN_OPTIONS}
    return redact(", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, 0, "none")))


def _metrics(history: History) -> list[list[str]]:
    """Return the last value of each metric in training, and its values in evaluations over time."""
    of_kind = {
        kind: {name.removeprefix(f"{kind}/") for name in history.metrics if name.startswith(f"{kind}/")}
        for kind in KINDS
    }
    steps = _spread(sorted({point.step for name in of_kind["eval"] for point in history.metrics[f"eval/{name}"]}))
    last = [kind for kind in ("train", "rollout") if of_kind[kind]]
    rows = [["metric", *(f"{kind}, last" for kind in last), *(f"eval, step {step:,}" for step in steps)]]
    for name in panel_names([history]):
        cells = [_number(history.values(f"{kind}/{name}")[-1:]) for kind in last]
        at_step = {point.step: point.value for point in history.metrics.get(f"eval/{name}", [])}
        rows.append([name, *cells, *(_number([at_step[step]] if step in at_step else []) for step in steps)])
    return rows


def _number(values: list[float]) -> str:
    return f"{values[0]:,.0f}" if values and abs(values[0]) >= 1e4 else f"{values[0]:.4g}" if values else ""


def _samples(folder: Path) -> list[list[tuple[str, str]]]:
    """Return the rows of a table of the answers that evaluations have shown: pairs of a class and a text."""
    answers: dict[tuple[str, str], dict[int, tuple[str, str]]] = {}  # prompt, expected -> step -> class, answer
    for row in _read_rows(folder / SAMPLES):
        kind, values = (
            "right" if row.get("right") is True else "wrong",
            [row.get(k) for k in ("prompt", "expected", "answer")],
        )
        if all(isinstance(value, str) for value in values):
            prompt, expected, answer = values
            answers.setdefault((prompt, expected), {})[row["step"]] = (kind, answer)
    steps = _spread(sorted({step for by_step in answers.values() for step in by_step}))
    if not steps:
        return []
    rows = [[("", name) for name in ("prompt", "expected", *(f"step {step:,}" for step in steps))]]
    for (prompt, expected), by_step in answers.items():
        rows.append([("", prompt), ("dim", expected), *(by_step.get(step, ("", "")) for step in steps)])
    return rows


def _answers(folder: Path) -> list[list[tuple[str, str]]]:
    """Return the rows of a table of the best and the worst answers of rounds."""
    rows = [[("", "")], [("", "best")], [("", "worst")]]
    for number in _spread(saved_rounds(folder)):
        try:
            found = {order: select_answers(folder, number, order, None, 1)[1] for order in ("best", "worst")}
        except ConfigError:  # its file is damaged, or was removed
            continue
        rows[0].append(("", f"round {number}"))
        for row, (order, ((_, answer), *_)) in zip(rows[1:], found.items()):
            said = "\n".join(
                [*(message["content"] for message in answer.prompt[-1:]), *map(text_of_turn, answer.messages)]
            )
            row.append(("right" if order == "best" else "wrong", f"{answer.summary}\n{said}"))
    return rows if len(rows[0]) > 1 else []


def _samples_table(rows: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
    first, *others = rows
    parts = ['<table class="samples">\n<tr>', *(f"<th>{text(cell)}</th>" for _, cell in first), "</tr>\n"]
    for row in others:
        cells = (f'<td><pre class="{kind}">{_lines(_short(cell))}</pre></td>' for kind, cell in row)
        parts += ["<tr>", *cells, "</tr>\n"]
    return [*parts, "</table>\n"]


def _short(content: str) -> str:
    return content if len(content) <= LONGEST else f"{content[:LONGEST]}..."


def _spread(values: list[int]) -> list[int]:
    """Return at most N_STEPS values with the first and the last one."""
    n = min(N_STEPS, len(values))
    return [values[i * (len(values) - 1) // max(n - 1, 1)] for i in range(n)]


def _read_rows(file: Path) -> Iterable[dict[str, Any]]:
    """Yield the readable rows of a log; none if it does not exist."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield parse_line(line)
        except UNREADABLE:
            continue
