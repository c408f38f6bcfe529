"""Schemas of rows that somebody has judged: preferences, feedback, labels, and rollouts with what they earned."""

import math
from typing import Any

from minitrain.config.schema import DatasetConfig
from minitrain.errors import DataError, short

from .examples import (
    ClassificationExample,
    Messages,
    Preference,
    Rollout,
    UnpairedPreference,
    compared,
    continuation_of,
    number_of,
    prompt_of,
    schema,
    text_of,
    turns_of,
)

TOKEN_COLUMNS = ("old_logps", "ref_logps", "values", "advantages", "returns")  # of a rollout
LOGPS = ("old_logps", "ref_logps")  # of these, the log-probabilities
ROUNDING = 1e-4  # a log-probability may come out above 0 by the last digits of large logits
_YES = {1: True, 0: False, "true": True, "false": False, "1": True, "0": False}  # True and 1 are one key


@schema("preference", "preference", "chosen", "rejected")
def _preference(row: dict, dataset: DatasetConfig) -> Preference:
    return compared(row, row["chosen"], row["rejected"])


@schema("chosen_messages", "preference", "chosen_messages", "rejected_messages")
def _chosen_messages(row: dict, dataset: DatasetConfig) -> Preference:
    return compared(row, row["chosen_messages"], row["rejected_messages"])


@schema("completion_label", "unpaired_preference", "prompt", "completion", "label")
def _completion_label(row: dict, dataset: DatasetConfig) -> UnpairedPreference:
    return UnpairedPreference(
        prompt_of(row), continuation_of(row["completion"], "completion"), _wanted(row["label"], "label")
    )


@schema("response_label", "unpaired_preference", "prompt", "response", "label")
def _response_label(row: dict, dataset: DatasetConfig) -> UnpairedPreference:
    return UnpairedPreference(
        prompt_of(row), continuation_of(row["response"], "response"), _wanted(row["label"], "label")
    )


@schema("messages_label", "unpaired_preference", "messages", "label")
def _messages_label(row: dict, dataset: DatasetConfig) -> UnpairedPreference:
    return _last_judged(turns_of(row["messages"], "messages"), "messages", _wanted(row["label"], "label"))


@schema("kto_tag", "unpaired_preference", "conversations", "kto_tag")
def _kto_tag(row: dict, dataset: DatasetConfig) -> UnpairedPreference:
    turns = turns_of(row["conversations"], "conversations")
    return _last_judged(turns, "conversations", _wanted(row["kto_tag"], "kto_tag"))


@schema("labelled", "classification", "text", "label")
def _labelled(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _judged_text(row, "text", "text_pair" if "text_pair" in row else None)


@schema("sentence_pair", "classification", "sentence1", "sentence2", "label")
def _sentence_pair(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _judged_text(row, "sentence1", "sentence2")


@schema("premise_hypothesis", "classification", "premise", "hypothesis", "label")
def _premise_hypothesis(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _judged_text(row, "premise", "hypothesis")


@schema("question_pair", "classification", "question1", "question2", "label")
def _question_pair(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _judged_text(row, "question1", "question2")


@schema("question_sentence", "classification", "question", "sentence", "label")
def _question_sentence(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _judged_text(row, "question", "sentence")


@schema("sentence", "classification", "sentence", "label")
def _sentence(row: dict, dataset: DatasetConfig) -> ClassificationExample:
    return _judged_text(row, "sentence", None)


@schema("rollout_ids", "rollout", "prompt_ids", "response_ids")
def _rollout_ids(row: dict, dataset: DatasetConfig) -> Rollout:
    for key in ("prompt_ids", "response_ids"):
        ids = row[key]
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(f"{key} is not a list of token ids", "invalid-row")
    return _earned(row, row["prompt_ids"], row["response_ids"])


@schema("rollout", "rollout", "prompt", "response")
def _rollout(row: dict, dataset: DatasetConfig) -> Rollout:
    return _earned(row, prompt_of(row), text_of(row, "response"))


@schema("rollout_messages", "rollout", "messages", "response")
def _rollout_messages(row: dict, dataset: DatasetConfig) -> Rollout:
    return _earned(row, turns_of(row["messages"], "messages"), text_of(row, "response"))


# ------------------------------------------------------------------------------------------------------- helpers


def _last_judged(turns: Messages, key: str, desirable: bool) -> UnpairedPreference:
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
        raise DataError(f"{key} does not end with words of the assistant", "no-answer")
    return UnpairedPreference(turns[:-1], turns[-1:], desirable)


def _wanted(value: Any, key: str) -> bool:
    value = value.strip().lower() if isinstance(value, str) else value
    if isinstance(value, (list, dict)) or value not in _YES:
        raise DataError(f"{key} is neither true nor false, but {short(value)!r}", "invalid-row")
    return _YES[value]


def _judged_text(row: dict, key: str, pair: str | None) -> ClassificationExample:
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, (str, int, float)) or label != label or label == "":
        raise DataError(f"label is neither a text nor a number, but {short(label)!r}", "invalid-row")
    return ClassificationExample(text_of(row, key), text_of(row, pair) if pair else None, str(label))


def _earned(row: dict, prompt: Messages | list[int], response: str | list[int]) -> Rollout:
    if not prompt:
        raise DataError("there is no prompt", "invalid-row")
    if not response:
        raise DataError("the response is empty, so there is nothing to learn", "no-answer")
    tokens: dict[str, list[float]] = {}
    for name in TOKEN_COLUMNS:
        given = row.get(name)
        if given is None:
            continue
        numbers = given if isinstance(given, list) else [given]
        tokens[name] = [number_of({name: value}, name) for value in numbers]
        if name in LOGPS and (above := [number for number in tokens[name] if number > ROUNDING]):
            raise DataError(
                f"{name} holds {above[0]:g}, but a log-probability is never above 0. Give logarithms of probabilities, "
                "with their sign",
                "invalid-row",
            )
    if "reward" not in row and "advantages" not in tokens and "returns" not in tokens:
        raise DataError("there is neither a reward, nor advantages, nor returns", "invalid-row")
    truncated = None if row.get("truncated") is None else _wanted(row["truncated"], "truncated")
    return Rollout(prompt, response, number_of(row, "reward") if "reward" in row else math.nan, tokens, truncated)
