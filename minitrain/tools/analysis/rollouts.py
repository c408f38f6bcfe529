"""Show the sampled answers of a round: `minitrain rollouts`."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minitrain.errors import ConfigError
from minitrain.io.redact import redact
from minitrain.training.metrics_log import (
    LARGEST_STEP,
    NOT_METRICS,
    ROLLOUTS,
    UNREADABLE,
    damaged_lines_message,
    parse_line,
    read_history,
    read_lines,
    round_file,
    warn_damaged,
)

from ..terminal import escape

N_ROUNDS = 10  # most rounds in the table
N_PROMPTS = 4
LONGEST = 1000  # characters of a turn, unless --prompt is set


class Marks(NamedTuple):
    """Marks around text: what is before and after it.

    Attributes:
        sampled: A turn that was sampled.
        reply: A turn of the environment.
        prompt: A turn of the prompt.
    """

    sampled: tuple[str, str]
    reply: tuple[str, str]
    prompt: tuple[str, str]


COLORS = Marks(("\x1b[32m", "\x1b[0m"), ("\x1b[2;34m", "\x1b[0m"), ("\x1b[2m", "\x1b[0m"))  # as those of `inspect`
BRACKETS = Marks(("⟦", "⟧"), ("«", "»"), ("", ""))


class Answer(NamedTuple):
    """A line of `rollouts/round-N.jsonl`. `rank` is its reward, -inf without one; `summary` is the rest in words."""

    step: int
    where: str
    line: int
    group: int
    prompt: list[dict]
    messages: list[dict]
    rank: float
    summary: str


def rounds_table(folder: Path) -> list[list[str]]:
    """Return the cells of a table of the rounds of a run, its names first; nothing if no round is logged."""
    rounds = _logged_rounds(folder)
    if not rounds:
        return []
    parts = list(dict.fromkeys(name for row in rounds for name in row if name.startswith("reward/")))
    names = ["round", "step", "reward", *parts, "ended", "length", "zero_variance"]
    names = [name for name in names if any(name in row for row in rounds)]
    n = min(N_ROUNDS, len(rounds))
    selected = [rounds[i * (len(rounds) - 1) // max(n - 1, 1)] for i in range(n)]
    return [names, *([_number(row[name]) if name in row else "" for name in names] for row in selected)]


def show_rounds(folder: Path) -> Iterator[str]:
    """Yield the lines of a table of the rounds of a run."""
    table = [[escape(cell) for cell in row] for row in rounds_table(folder)]
    if not table:
        return
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip()
    yield ""


def show_answers(
    folder: Path,
    number: int | None = None,
    order: str | None = None,
    line: int | None = None,
    n: int | None = None,
    marks: Marks = BRACKETS,
) -> Iterator[str]:
    """Yield lines about the answers of a round: each prompt with its best and its worst answer.

    Args:
        folder: The run directory.
        number: The round; by default, the last.
        order: "best" or "worst" to show only the answers of the round with the highest or lowest rewards.
        line: Show all answers to the prompt on this line of its data file.
        n: Number of prompts, or of answers with `order` or `line`; by default, 4 or all answers to the prompt.
        marks: Marks around turns.

    Raises:
        ConfigError: The folder has no answers of the round or to the prompt.
    """
    title, shown = select_answers(folder, number, order, line, n)
    yield title
    yield f"{marks.sampled[0]}sampled{marks.sampled[1]}, {marks.reply[0]}tool result: reply{marks.reply[1]}"
    limit, last = LONGEST if line is None else math.inf, None
    for name, answer in shown:
        if answer.group != last:
            yield from ("", f"prompt {escape(answer.where)}")
            for message in answer.prompt:
                yield from _indented(f"{message['role']}: {content_of(message)}", marks.prompt, limit, 2)
        last = answer.group
        yield f"  {name}: {answer.summary}"
        for message in answer.messages:
            mark = marks.sampled if is_sampled(message) else marks.reply
            yield from _indented(text_of_turn(message), mark, limit, 4)


def select_answers(
    folder: Path, number: int | None, order: str | None, line: int | None, n: int | None, complete: bool = False
) -> tuple[str, list[tuple[str, Answer]]]:
    """Return a title, and the answers to show with their names, those to a prompt after each other.

    Args:
        folder, number, order, line, n: As for `show_answers`.
        complete: Without `order` and `line`, select all answers to each prompt, by default to all prompts.

    Raises:
        ConfigError: The folder has no answers of the round or to the prompt.
    """
    number = _find_round(folder, number)
    answers = _read_answers(folder, number)
    n_prompts = len({answer.group for answer in answers})
    title = (
        f"round {number}, step {answers[0].step}: {len(answers)} answers to {n_prompts} prompt{'s' * (n_prompts > 1)}"
    )
    if line is not None:
        lines = ", ".join(map(str, sorted({one.line for one in answers})))
        answers = [one for one in answers if one.line == line]
        if not answers:
            message = f"--prompt: round {number} has no answers to line {line}. Choose one of its lines: {lines}."
            raise ConfigError(message, "not-found")
    return title, list(_select(answers, order, line is not None, n, complete))


def _select(
    answers: list[Answer], order: str | None, all_answers: bool, n: int | None, complete: bool
) -> Iterator[tuple[str, Answer]]:
    """Yield the answers to show, with names; see `select_answers`."""
    ranked = sorted(answers, key=lambda one: (one.rank, -one.group), reverse=True)
    if order is not None or all_answers:
        ranked = ranked[::-1] if order == "worst" else ranked
        ranked = ranked[: n or (None if all_answers else N_PROMPTS)]
        ranked = sorted(ranked, key=lambda one: one.group) if order is None else ranked
        yield from ((f"answer {i}", one) for i, one in enumerate(ranked, 1))
        return
    for number in sorted({one.group for one in answers})[: n or (None if complete else N_PROMPTS)]:
        best, *between = [one for one in ranked if one.group == number]
        worst = between.pop() if between else best
        differ = best.rank > worst.rank
        yield ("best" if differ else "first"), best
        yield from ((f"answer {i}", one) for i, one in enumerate(between if complete else (), 2))
        if best is not worst:
            yield ("worst" if differ else "last"), worst


# ------------------------------------------------------------------------------------------------------ reading


def _logged_rounds(folder: Path) -> list[dict[str, float]]:
    """Return the readable metrics of each round."""
    warn_damaged(read_history(folder).damaged)
    rounds = []
    for line in read_lines(folder, "metrics.jsonl", ""):
        try:
            row = parse_line(line)
            if row.get("kind") == "rollout":
                metrics = {name: float(value) for name, value in row.items() if name not in NOT_METRICS}
                rounds.append({"step": float(row["step"])} | metrics)
        except (*UNREADABLE, TypeError):
            continue  # reported above
    return rounds


def saved_rounds(folder: Path) -> list[int]:
    """Return the rounds whose answers exist."""
    names = [file.stem.removeprefix("round-") for file in (folder / ROLLOUTS).glob("round-*.jsonl")]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def _find_round(folder: Path, number: int | None) -> int:
    """Return a round whose answers exist, by default the last. Raise ConfigError if there is none."""
    numbers = saved_rounds(folder)
    if not numbers:
        hint = "Choose a run that samples answers, with rollout.save_samples."
        raise ConfigError(f"{folder}: has no answers in {ROLLOUTS}/. {hint}", "no-data")
    if number is not None and number not in numbers:
        message = f"--round: {folder / ROLLOUTS} has no round {number}. Choose one of {_ranges(numbers)}."
        raise ConfigError(message, "not-found")
    return numbers[-1] if number is None else number


def _read_answers(folder: Path, number: int) -> list[Answer]:
    """Return the answers of a round; skip damaged lines with a warning on stderr. Raises ConfigError."""
    file = round_file(folder, number)
    answers, damaged = [], []
    for i, line in enumerate(read_lines(file.parent, file.name, "Choose another round."), 1):
        try:
            answers.append(_parse(parse_line(line)))
        except (*UNREADABLE, KeyError, TypeError, AttributeError):
            damaged.append(i)
    if not answers:
        raise ConfigError(f"{file}: has no readable line. Choose another round.", "damaged-file")
    if damaged:
        warn_damaged([damaged_lines_message(file, damaged) + " skipped"])
    return answers


def _parse(row: dict) -> Answer:
    """Return the answer of a line. Raise ValueError, KeyError, TypeError or AttributeError for another line."""
    rank = -math.inf if row["reward"] is None else float(row["reward"])
    parts = ", ".join(f"{escape(name)} {float(value):.4g}" for name, value in row["parts"].items())
    summary = ("not judged" if row["reward"] is None else f"reward {rank:.4g}") + (f" ({parts})" if parts else "")
    if row.get("advantage") is not None:
        summary += f", advantage {float(row['advantage']):.3g}"
    summary += f"; {int(row['tokens'])} tokens, {'ended' if row['ended'] else 'cut off'}"
    summary += f", mean logp {float(row['logp']):.3g}"
    for message in (*row["prompt"], *row["messages"]):
        text_of_turn(message)  # raises for another value
    line, source = int(row["line"]), redact(str(row["source"]))
    where = f"{source}:{line}" if source else f"row {line}"
    return Answer(row["step"], where, line, int(row["group"]), row["prompt"], row["messages"], rank, summary)


# ------------------------------------------------------------------------------------------------------ writing


def is_sampled(message: dict) -> bool:
    """Return whether a turn after the prompt was sampled."""
    return message["role"] == "assistant"


def text_of_turn(message: dict) -> str:
    """Return the text of a turn after the prompt."""
    content, reasoning = content_of(message), message.get("reasoning_content")
    if not is_sampled(message):
        return f"{'tool result' if message['role'] == 'tool' else message['role']}: {content}"
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or []]
    before = f"«reasoning: {reasoning}»" if reasoning else ""
    return before + content + "".join(f"«tool call: {call}»" for call in calls)


def content_of(message: dict) -> str:
    """Return the text of a turn, without reasoning and tool calls."""
    return str(message.get("content") or "")


def _indented(text: str, mark: tuple[str, str], limit: float, indent: int) -> Iterator[str]:
    """Yield the lines of a string with a mark around it. The middle of a long one is left out."""
    if len(text) > limit:
        half = int(limit) // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    yield from (" " * indent + line for line in f"{mark[0]}{escape(text)}{mark[1]}".split("\n"))


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and abs(value) < LARGEST_STEP else f"{value:.3g}"


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers in words, such as `1 to 4, 6`."""
    starts = [i for i in range(len(numbers)) if i == 0 or numbers[i] > numbers[i - 1] + 1]
    runs = [numbers[a:b] for a, b in zip(starts, [*starts[1:], len(numbers)], strict=True)]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
