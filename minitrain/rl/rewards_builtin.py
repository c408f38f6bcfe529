"""The built-in reward functions."""

import re
from collections import Counter
from dataclasses import MISSING, dataclass
from typing import Any

from minitrain.config.issues import regex_error
from minitrain.config.option import option
from minitrain.inference.evaluation import final_answer

from .rewards import Answer, register_reward

REFERENCES = ("answer", "response", "completion", "output")  # keys of a row with the reference, in order of priority


@dataclass
class ExactMatchOptions:
    match: str = option("text", "Part of an answer that must equal that of the reference, as in eval_generate.match.")
    key: str | None = option(
        None, "Key of the row with the reference (default: answer, response, completion or output)."
    )


def _check_match(options: ExactMatchOptions) -> list[tuple[str, str, str]]:
    error = None if options.match in ("text", "number") else regex_error(options.match)
    return [("match", "invalid-value", _not_regex(options.match, error))] if error else []


def _not_regex(pattern: str, error: str) -> str:
    return f"{pattern!r} is not a valid regular expression: {error}."


@register_reward(
    "exact_match",
    ExactMatchOptions,
    check=_check_match,
    reads=lambda row, options: reference_of(row, options.key) is not None,
)
def exact_match(answer: Answer, options: ExactMatchOptions) -> float | None:
    """Return 1 if the final answer equals that of the row, else 0; None if the row has no reference."""
    reference = reference_of(answer.row, options.key)
    expected = None if reference is None else final_answer(reference, options.match)
    if expected in (None, ""):
        return None
    return float(not says_nothing(answer) and final_answer(answer.text, options.match) == expected)


def says_nothing(answer: Answer) -> bool:
    """Return whether a response is empty or repeats the turn before it."""
    before = answer.messages[-2].get("content") if len(answer.messages) > 1 else None
    text = answer.text.strip()
    return not text or (isinstance(before, str) and text == before.strip())


def reference_of(row: Any, key: str | None) -> str | None:
    """Return the reference answer of a data row, from a key or from its last turn of the assistant."""
    for name in (key,) if key else REFERENCES:
        if row.get(name) is not None:
            return str(row[name])
    turns = row.get("messages") or row.get("conversations") or []
    contents = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, dict)]
    roles = [turn.get("role", turn.get("from")) for turn in turns if isinstance(turn, dict)]
    answers = [text for role, text in zip(roles, contents, strict=True) if role in ("assistant", "gpt")]
    return answers[-1] if answers and not key else None


@dataclass
class RegexOptions:
    pattern: str = option(MISSING, "Regular expression.")
    full: bool = option(True, "Match the full response, not a part of it.")


def _check_pattern(options: RegexOptions) -> list[tuple[str, str, str]]:
    error = regex_error(options.pattern)
    return [("pattern", "invalid-value", _not_regex(options.pattern, error))] if error else []


@register_reward("regex", RegexOptions, check=_check_pattern)
def regex(answer: Answer, options: RegexOptions) -> float:
    """Return 1 if the response matches a regular expression, else 0; 0 if it is empty or repeats the prompt."""
    match = re.fullmatch if options.full else re.search
    return float(not says_nothing(answer) and match(options.pattern, answer.text, re.DOTALL) is not None)


@dataclass
class OverlongOptions:
    max_tokens: int = option(256, "Tokens of a response up to which it is not too long, with the buffer.", ge=1)
    buffer: int = option(64, "Tokens before max_tokens over which the penalty grows from 0 to -1.", ge=1)


@register_reward("overlong", OverlongOptions)
def overlong(answer: Answer, options: OverlongOptions) -> float:
    """Return 0 up to max_tokens - buffer tokens, then down to -1 at max_tokens (arXiv 2503.14476, eq. 13)."""
    excess = len(answer.ids) - (options.max_tokens - options.buffer)
    return -min(1.0, max(0.0, excess / options.buffer))


@dataclass
class LengthOptions:
    target: int = option(0, "Number of tokens without a penalty.", ge=0)
    scale: float = option(100.0, "Difference from the target, in tokens, whose penalty is -1.", gt=0)


@register_reward("length", LengthOptions)
def length(answer: Answer, options: LengthOptions) -> float:
    """Return minus the difference of the length from a target, divided by a scale."""
    return -abs(len(answer.ids) - options.target) / options.scale


@dataclass
class RepetitionOptions:
    n: int = option(3, "Number of consecutive words that count as repeated.", ge=1)


@register_reward("repetition", RepetitionOptions)
def repetition(answer: Answer, options: RepetitionOptions) -> float:
    """Return minus the fraction of the n-grams of words that occurred before in the response."""
    words = answer.text.split()
    grams = Counter(tuple(words[i : i + options.n]) for i in range(len(words) - options.n + 1))
    total = sum(grams.values())
    return -(total - len(grams)) / total if total else 0.0
