"""Schemas of rows that somebody has judged: preferences, feedback, labels, and rollouts with what they earned."""

import math
from typing import Any

from ..errors import DataError
from ..schema import DatasetConfig
from .records import (
    TRANSCRIPT,
    Feedback,
    Labelled,
    Messages,
    Preference,
    Rollout,
    assistant,
    number_of,
    schema,
    text_of,
    transcript_of,
    turn_of,
    turns_of,
    user,
)

TOKEN_COLUMNS = ("old_logps", "ref_logps", "values", "advantages", "returns")  # of a rollout
_YES = {1: True, 0: False, "true": True, "false": False, "1": True, "0": False}  # True and 1 are one key


@schema("preference", "preference", "chosen", "rejected")
def _preference(row: dict, dataset: DatasetConfig) -> Preference:
    return compared(row, row["chosen"], row["rejected"])


@schema("chosen_messages", "preference", "chosen_messages", "rejected_messages")
def _chosen_messages(row: dict, dataset: DatasetConfig) -> Preference:
    return compared(row, row["chosen_messages"], row["rejected_messages"])


@schema("completion_label", "feedback", "prompt", "completion", "label")
def _completion_label(row: dict, dataset: DatasetConfig) -> Feedback:
    return Feedback(_prompt(row), _continuation(row["completion"], "completion"), _wanted(row["label"], "label"))


@schema("response_label", "feedback", "prompt", "response", "label")
def _response_label(row: dict, dataset: DatasetConfig) -> Feedback:
    return Feedback(_prompt(row), _continuation(row["response"], "response"), _wanted(row["label"], "label"))


@schema("messages_label", "feedback", "messages", "label")
def _messages_label(row: dict, dataset: DatasetConfig) -> Feedback:
    return _last_judged(turns_of(row["messages"], "messages"), "messages", _wanted(row["label"], "label"))


@schema("kto_tag", "feedback", "conversations", "kto_tag")
def _kto_tag(row: dict, dataset: DatasetConfig) -> Feedback:
    turns = turns_of(row["conversations"], "conversations")
    return _last_judged(turns, "conversations", _wanted(row["kto_tag"], "kto_tag"))


@schema("labelled", "labelled", "text", "label")
def _labelled(row: dict, dataset: DatasetConfig) -> Labelled:
    return _judged_text(row, "text", "text_pair" if "text_pair" in row else None)


@schema("sentence_pair", "labelled", "sentence1", "sentence2", "label")
def _sentence_pair(row: dict, dataset: DatasetConfig) -> Labelled:
    return _judged_text(row, "sentence1", "sentence2")


@schema("premise_hypothesis", "labelled", "premise", "hypothesis", "label")
def _premise_hypothesis(row: dict, dataset: DatasetConfig) -> Labelled:
    return _judged_text(row, "premise", "hypothesis")


@schema("question_pair", "labelled", "question1", "question2", "label")
def _question_pair(row: dict, dataset: DatasetConfig) -> Labelled:
    return _judged_text(row, "question1", "question2")


@schema("question_sentence", "labelled", "question", "sentence", "label")
def _question_sentence(row: dict, dataset: DatasetConfig) -> Labelled:
    return _judged_text(row, "question", "sentence")


@schema("sentence", "labelled", "sentence", "label")
def _sentence(row: dict, dataset: DatasetConfig) -> Labelled:
    return _judged_text(row, "sentence", None)


@schema("rollout_ids", "rollout", "prompt_ids", "response_ids")
def _rollout_ids(row: dict, dataset: DatasetConfig) -> Rollout:
    for key in ("prompt_ids", "response_ids"):
        ids = row[key]
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(f"{key} is not a list of token ids")
    return _earned(row, row["prompt_ids"], row["response_ids"])


@schema("rollout", "rollout", "prompt", "response")
def _rollout(row: dict, dataset: DatasetConfig) -> Rollout:
    return _earned(row, _prompt(row), text_of(row, "response"))


@schema("rollout_messages", "rollout", "messages", "response")
def _rollout_messages(row: dict, dataset: DatasetConfig) -> Rollout:
    return _earned(row, turns_of(row["messages"], "messages"), text_of(row, "response"))


# ------------------------------------------------------------------------------------------------------- helpers


def compared(row: dict, chosen: Any, rejected: Any) -> Preference:
    """A preference. The prompt stands in a column of its own, or is what both continuations begin with."""
    good, bad = _continuation(chosen, "chosen"), _continuation(rejected, "rejected")
    prompt = _prompt(row)
    if not prompt:
        n = next((i for i, (a, b) in enumerate(zip(good, bad)) if a != b), min(len(good), len(bad)))
        n = min(n, len(good) - 1, len(bad) - 1)
        prompt, good, bad = good[:n], good[n:], bad[n:]
    elif good[: len(prompt)] == prompt and bad[: len(prompt)] == prompt:  # it is in all three
        good, bad = good[len(prompt) :], bad[len(prompt) :]
    for key, turns in (("chosen", good), ("rejected", bad)):
        if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
            raise DataError(f"{key} does not end with words of the assistant")
    if good == bad:
        raise DataError("chosen and rejected are the same")
    return Preference(prompt, good, bad, number_of(row, "margin") if "margin" in row else 0.0)


def _prompt(row: dict) -> Messages:
    """The turns before an answer, from whichever column holds them; none, if none does."""
    turns: Messages = []
    if row.get("system"):
        turns.append({"role": "system", "content": text_of(row, "system")})
    for key in ("prompt", "conversations", "messages", "question", "instruction"):
        if key not in row:
            continue
        if isinstance(row[key], list):
            return turns + turns_of(row[key], key)
        text = text_of(row, key)
        if key == "instruction" and row.get("input"):
            text += "\n" + text_of(row, "input")
        return [*turns, user(text)]
    return []


def _continuation(value: Any, key: str) -> Messages:
    """An answer as a text, as one turn, or as turns: a list of them, or a transcript."""
    if isinstance(value, dict):
        return [turn_of(value, key)]
    if isinstance(value, list):
        return turns_of(value, key)
    if isinstance(value, str) and value.startswith(TRANSCRIPT):
        return transcript_of(value)
    return [assistant(text_of({key: value}, key))]


def _last_judged(turns: Messages, key: str, desirable: bool) -> Feedback:
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
        raise DataError(f"{key} does not end with words of the assistant")
    return Feedback(turns[:-1], turns[-1:], desirable)


def _wanted(value: Any, key: str) -> bool:
    value = value.strip().lower() if isinstance(value, str) else value
    if isinstance(value, (list, dict)) or value not in _YES:
        raise DataError(f"{key} is neither true nor false, but {str(value)[:60]!r}")
    return _YES[value]


def _judged_text(row: dict, key: str, pair: str | None) -> Labelled:
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, (str, int, float)) or label != label or label == "":
        raise DataError(f"label is neither a text nor a number, but {str(label)[:60]!r}")
    return Labelled(text_of(row, key), text_of(row, pair) if pair else None, str(label))


def _earned(row: dict, prompt: Messages | list[int], response: str | list[int]) -> Rollout:
    if not prompt:
        raise DataError("there is no prompt")
    if not response:
        raise DataError("the response is empty, so there is nothing to learn")
    tokens: dict[str, list[float]] = {}
    for name in TOKEN_COLUMNS:
        given = row.get(name)
        if given is None:
            continue
        numbers = given if isinstance(given, list) else [given]
        tokens[name] = [number_of({name: value}, name) for value in numbers]
    if "reward" not in row and "advantages" not in tokens and "returns" not in tokens:
        raise DataError("there is neither a reward, nor advantages, nor returns")
    return Rollout(prompt, response, number_of(row, "reward") if "reward" in row else math.nan, tokens)
