"""Row formats of texts to score: steps of solutions with labels, and queries with texts that answer them."""

import math
from dataclasses import dataclass
from typing import Any

from minitrain.config.sections import DatasetConfig
from minitrain.errors import DataError, short

from .examples import Example, number_of, prompt_of, row_format, text_of
from .formats_preference import BOOLEANS
from .messages import Messages


@dataclass
class Solution(Example):
    """The steps of a response, each with its label: 1 for a right one, 0 for a wrong one, NaN without a label.

    Attributes:
        separator: What follows each step.
    """

    prompt: Messages
    steps: list[str]
    labels: list[float]
    separator: str = "\n"


@dataclass
class Retrieval(Example):
    """A query, a text that answers it, and texts that do not."""

    query: str
    positive: str
    negatives: list[str]


class Ranking(Retrieval):
    """The same for a model that reads the query with each text."""


@row_format("steps_labels", "solution", "prompt", "steps", "labels")
def _steps_labels(row: dict, dataset: DatasetConfig) -> Solution:
    return _solution(row, "steps")


@row_format("completions_labels", "solution", "prompt", "completions", "labels")
def _completions_labels(row: dict, dataset: DatasetConfig) -> Solution:
    return _solution(row, "completions")


@row_format("query_positive", "retrieval", "query", "positive")
def _query_positive(row: dict, dataset: DatasetConfig) -> Retrieval:
    return _retrieval(row, "query")


@row_format("anchor_positive", "retrieval", "anchor", "positive")
def _anchor_positive(row: dict, dataset: DatasetConfig) -> Retrieval:
    return _retrieval(row, "anchor")


@row_format("query_ranking", "ranking", "query", "positive")
def _query_ranking(row: dict, dataset: DatasetConfig) -> Ranking:
    return _ranking(row, "query")


@row_format("anchor_ranking", "ranking", "anchor", "positive")
def _anchor_ranking(row: dict, dataset: DatasetConfig) -> Ranking:
    return _ranking(row, "anchor")


def _solution(row: dict, key: str) -> Solution:
    steps, labels = row[key], row["labels"]
    for name, column in ((key, steps), ("labels", labels)):
        if not isinstance(column, list) or not column:
            raise DataError(f"{name}: expected a list, one entry per step, got {short(column)!r}", "invalid-row")
    if len(labels) != len(steps):
        raise DataError(f"labels: expected one per step ({len(steps)}), got {len(labels)}", "invalid-row")
    separator = text_of(row, "step_separator") if "step_separator" in row else "\n"
    texts = [text_of({key: step}, key) for step in steps]
    return Solution(prompt_of(row), texts, [_step_label(label) for label in labels], separator)


def _step_label(label: Any) -> float:
    """Return the label of a step: true or false, a probability, or null for none."""
    if label is None:
        return math.nan
    number = number_of({"labels": BOOLEANS.get(label, label) if isinstance(label, (str, bool)) else label}, "labels")
    if not 0 <= number <= 1:
        raise DataError(f"labels: expected numbers from 0 to 1, got {number:g}", "invalid-row")
    return number


def _retrieval(row: dict, key: str) -> Retrieval:
    return Retrieval(text_of(row, key), text_of(row, "positive"), _negatives(row))


def _ranking(row: dict, key: str) -> Ranking:
    example = _retrieval(row, key)
    if not example.negatives:
        raise DataError("negatives: expected at least one text to rank below the positive, got none", "invalid-row")
    return Ranking(example.query, example.positive, example.negatives)


def _negatives(row: dict) -> list[str]:
    """Return the columns `negatives`, a list, and `negative`, a text."""
    found: Any = row.get("negatives") or []
    if not isinstance(found, list):
        raise DataError(f"negatives: expected a list of strings, got {short(found)!r}", "invalid-row")
    texts = [text_of({"negatives": text}, "negatives") for text in found]
    return [*texts, *([text_of(row, "negative")] if row.get("negative") else [])]
