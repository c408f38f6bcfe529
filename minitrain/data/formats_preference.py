"""Row formats of preferences, unpaired preferences, classification and rollouts."""

import json
import math
from typing import Any

from minitrain.config.sections import DatasetConfig
from minitrain.errors import DataError, short

from .examples import (
    ClassificationExample,
    Preference,
    Rollout,
    TrackedRow,
    UnpairedPreference,
    check_ends_with_assistant,
    number_of,
    preference_of,
    prompt_of,
    response_of,
    row_format,
    text_of,
    variables_of,
)
from .messages import Messages, parse_messages

TOKEN_COLUMNS = ("old_logps", "ref_logps", "values", "advantages", "returns")  # of a rollout
LOGPS = ("old_logps", "ref_logps")  # those of TOKEN_COLUMNS that are log-probabilities
ROUNDING = 1e-4  # rounding of large logits can give a log-probability slightly above 0
BOOLEANS = {1: True, 0: False, "true": True, "false": False, "1": True, "0": False}  # True and 1 are one key


@row_format("preference", "preference", "chosen", "rejected")
def _preference(row: dict, dataset: DatasetConfig) -> Preference:
    return preference_of(row, row["chosen"], row["rejected"])


@row_format("chosen_messages", "preference", "chosen_messages", "rejected_messages")
def _chosen_messages(row: dict, dataset: DatasetConfig) -> Preference:
    return preference_of(row, row["chosen_messages"], row["rejected_messages"])


@row_format("openai_preference", "preference", "input", "preferred_output", "non_preferred_output")
def openai_preference_of(row: dict, dataset: DatasetConfig) -> Preference:
    """Return a preference from a row in OpenAI's format, whose `input` has the messages and the tools."""
    given = row["input"]
    if not isinstance(given, dict):
        raise DataError(f"input: expected an object with messages, got {short(given)!r}", "invalid-row")
    given = TrackedRow(given)
    pair = preference_of(given, row["preferred_output"], row["non_preferred_output"])
    pair.variables = variables_of(given, dataset)
    pair.unread = [f"input.{key}" for key in given.unread()]
    return pair


@row_format("completion_label", "unpaired_preference", "prompt", "completion", "label")
def _completion_label(row: dict, dataset: DatasetConfig) -> UnpairedPreference:
    return UnpairedPreference(
        prompt_of(row), response_of(row["completion"], "completion"), _boolean(row["label"], "label")
    )


@row_format("response_label", "unpaired_preference", "prompt", "response", "label")
def _response_label(row: dict, dataset: DatasetConfig) -> UnpairedPreference:
    return UnpairedPreference(prompt_of(row), response_of(row["response"], "response"), _boolean(row["label"], "label"))


@row_format("messages_label", "unpaired_preference", "messages", "label")
def _messages_label(row: dict, dataset: DatasetConfig) -> UnpairedPreference:
    return _last_turn_labeled(row, "messages", _boolean(row["label"], "label"))


@row_format("kto_tag", "unpaired_preference", "conversations", "kto_tag")
def _kto_tag(row: dict, dataset: DatasetConfig) -> UnpairedPreference:
    return _last_turn_labeled(row, "conversations", _boolean(row["kto_tag"], "kto_tag"))


@row_format("labelled", "classification", "text", "label")
def _labelled(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _classification(row, "text", "text_pair" if "text_pair" in row else None)


@row_format("labels", "classification", "text", "labels")
def _labels(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _classification(row, "text", "text_pair" if "text_pair" in row else None, "labels")


@row_format("sentence_pair", "classification", "sentence1", "sentence2", "label")
def _sentence_pair(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _classification(row, "sentence1", "sentence2")


@row_format("premise_hypothesis", "classification", "premise", "hypothesis", "label")
def _premise_hypothesis(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _classification(row, "premise", "hypothesis")


@row_format("question_pair", "classification", "question1", "question2", "label")
def _question_pair(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _classification(row, "question1", "question2")


@row_format("question_sentence", "classification", "question", "sentence", "label")
def _question_sentence(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _classification(row, "question", "sentence")


@row_format("sentence", "classification", "sentence", "label")
def _sentence(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _classification(row, "sentence", None)


@row_format("rollout_ids", "rollout", "prompt_ids", "response_ids")
def _rollout_ids(row: dict, dataset: DatasetConfig) -> Rollout:
    for key in ("prompt_ids", "response_ids"):
        ids = row[key]
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(f"{key}: expected a list of token ids, got {short(ids)!r}", "invalid-row")
    return _make_rollout(row, row["prompt_ids"], row["response_ids"])


@row_format("rollout", "rollout", "prompt", "response")
def _rollout(row: dict, dataset: DatasetConfig) -> Rollout:
    return _make_rollout(row, prompt_of(row), text_of(row, "response"))


@row_format("rollout_messages", "rollout", "messages", "response")
def _rollout_messages(row: dict, dataset: DatasetConfig) -> Rollout:
    return _make_rollout(row, parse_messages(row["messages"], "messages"), text_of(row, "response"))


# ------------------------------------------------------------------------------------------------------- helpers


def _last_turn_labeled(row: dict, key: str, desirable: bool) -> UnpairedPreference:
    turns = parse_messages(row[key], key)
    check_ends_with_assistant(turns, key)
    return UnpairedPreference(turns[:-1], turns[-1:], desirable)


def _boolean(value: Any, key: str) -> bool:
    value = value.strip().lower() if isinstance(value, str) else value
    if isinstance(value, (list, dict)) or value not in BOOLEANS:
        raise DataError(f"{key}: expected true or false, got {short(value)!r}", "invalid-row")
    return BOOLEANS[value]


def _classification(row: dict, key: str, pair: str | None, of_label: str = "label") -> ClassificationExample:
    """Return an example. A list of labels is written as JSON, sorted."""
    value = row[of_label]
    for label in value if isinstance(value, list) else [value]:
        if isinstance(label, bool) or not isinstance(label, (str, int, float)) or label != label or label == "":
            raise DataError(f"{of_label}: expected a string or a number, got {short(label)!r}", "invalid-row")
    label = json.dumps(sorted(set(map(str, value)))) if isinstance(value, list) else str(value)
    return ClassificationExample(text_of(row, key), text_of(row, pair) if pair else None, label)


def _make_rollout(row: dict, prompt: Messages | list[int], response: str | list[int]) -> Rollout:
    if not prompt:
        raise DataError("prompt: expected a prompt, got none", "invalid-row")
    if not response:
        raise DataError("response: expected a response, got an empty string", "no-answer")
    tokens: dict[str, list[float]] = {}
    for name in TOKEN_COLUMNS:
        column = row.get(name)
        if column is None:
            continue
        numbers = column if isinstance(column, list) else [column]
        tokens[name] = [number_of({name: number}, name) for number in numbers]
        if name in LOGPS and (positive := [number for number in tokens[name] if number > ROUNDING]):
            raise DataError(
                f"{name}: expected log-probabilities, at most 0, got {positive[0]:g}. Keep the sign of the logarithms",
                "invalid-row",
            )
    if "reward" not in row and "advantages" not in tokens and "returns" not in tokens:
        raise DataError("expected a reward, advantages or returns, got none of them", "invalid-row")
    truncated = None if row.get("truncated") is None else _boolean(row["truncated"], "truncated")
    return Rollout(prompt, response, number_of(row, "reward") if "reward" in row else math.nan, tokens, truncated)
