"""Rows -> records: one small function for each schema that people keep their data in.

To add a schema: a function here, decorated with the keys it is known by, and its test.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import DataError
from ..schema import DatasetConfig

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}


@dataclass
class Conversation:
    """Messages with `role` (system, user, assistant, tool) and `content`; those of the assistant are learned."""

    messages: list[dict[str, str]]


@dataclass
class PlainText:
    """A text that is learned whole."""

    text: str


@dataclass
class Schema:
    required: tuple[str, ...]
    convert: Callable[[dict, DatasetConfig], Conversation | PlainText]


SCHEMAS: dict[str, Schema] = {}


def schema(name: str, *required: str):
    """Registers a converter for rows that have all the `required` keys; earlier ones are tried first."""

    def register(convert: Callable) -> Callable:
        SCHEMAS[name] = Schema(required, convert)
        return convert

    return register


def to_record(row: dict, dataset: DatasetConfig) -> Conversation | PlainText:
    """The record in a row, by `dataset.type` or by the row's keys.

    Raises DataError with the reason; the caller adds file and line.
    """
    if dataset.columns:
        row = row | {name: _column(row, column) for name, column in dataset.columns.items()}
    if dataset.type is not None:
        name = dataset.type
        missing = [key for key in SCHEMAS[name].required if key not in row]
        if missing:
            raise DataError(f"type {name} needs the key {missing[0]!r}; the row has {_keys(row)}")
    else:
        name = _recognise(dataset.columns) or _recognise(row)
    if name is None:
        kinds = "; ".join(f"{n}: {', '.join(s.required)}" for n, s in SCHEMAS.items())
        raise DataError(
            f"no known schema has the keys {_keys(row)}. Known are ({kinds}). "
            "Map your columns, for example columns: {prompt: my_column, response: my_other_column}"
        )
    templated = dataset.prompt_template or dataset.response_template
    if templated and name not in ("prompt_response", "question_answer", "alpaca"):
        raise DataError(f"prompt_template and response_template do not apply to rows of type {name}")
    return SCHEMAS[name].convert(row, dataset)


def _recognise(keys: dict) -> str | None:
    return next((name for name, s in SCHEMAS.items() if all(key in keys for key in s.required)), None)


# ---------------------------------------------------------------------------------------------------- the schemas


@schema("messages", "messages")
def _messages(row: dict, dataset: DatasetConfig) -> Conversation:
    return Conversation(_turns(row["messages"], "messages"))


@schema("conversations", "conversations")
def _conversations(row: dict, dataset: DatasetConfig) -> Conversation:
    turns = _turns(row["conversations"], "conversations")
    if row.get("system"):
        turns = [{"role": "system", "content": _text(row, "system")}, *turns]
    return Conversation(turns)


@schema("prompt_response", "prompt", "response")
def _prompt_response(row: dict, dataset: DatasetConfig) -> Conversation:
    return _pair(row, "prompt", "response", dataset)


@schema("alpaca", "instruction", "output")
def _alpaca(row: dict, dataset: DatasetConfig) -> Conversation:
    turns = []
    if row.get("system"):
        turns.append({"role": "system", "content": _text(row, "system")})
    for i, pair in enumerate(row.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"history[{i}] is not a pair of texts [instruction, output]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    prompt = _text(row, "instruction")
    if row.get("input"):
        prompt += "\n" + _text(row, "input")
    pair = _pair(row | {"prompt": prompt, "response": _text(row, "output")}, "prompt", "response", dataset)
    return Conversation(turns + pair.messages)


@schema("question_answer", "question", "answer")
def _question_answer(row: dict, dataset: DatasetConfig) -> Conversation:
    pair = row | {"prompt": row["question"], "response": row["answer"]}
    return _pair(pair, "prompt", "response", dataset)


@schema("text", "text")
def _plain_text(row: dict, dataset: DatasetConfig) -> PlainText:
    text = _text(row, "text")
    if not text:
        raise DataError("text is empty")
    return PlainText(text)


# ------------------------------------------------------------------------------------------------------- helpers


def _pair(row: dict, prompt_key: str, response_key: str, dataset: DatasetConfig) -> Conversation:
    prompt, response = _text(row, prompt_key), _text(row, response_key)
    if dataset.prompt_template is not None:
        prompt = _fill(dataset.prompt_template, row, "prompt_template")
    if dataset.response_template is not None:
        response = _fill(dataset.response_template, row, "response_template")
    if not response:
        raise DataError(f"{response_key} is empty, so there is nothing to learn")
    return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])


def _fill(template: str, row: dict, name: str) -> str:
    """Puts columns into a template. Text that comes from the data is never read as a template itself."""

    def value(match: re.Match) -> str:
        if match[1] not in row:
            raise DataError(f"{name} names the column {match[1]!r}; the row has {_keys(row)}")
        return _text(row, match[1])

    return re.sub(r"\{(\w+)\}", value, template)


def _turns(turns: object, key: str) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{key} is not a list of turns")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"{key}[{i}] is not an object with a role and a content")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{key}[{i}] has the role {str(role)[:60]!r}; known are {', '.join(ROLES)}")
        content = turn.get("content", turn.get("value"))
        messages.append({"role": ROLES[role], "content": _content(content, f"{key}[{i}]")})
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise DataError(f"{key} has no turn of the assistant, so there is nothing to learn")
    return messages


def _content(content: object, where: str) -> str:
    """A text, or a list of text parts as multimodal data sets write it."""
    if isinstance(content, list):
        texts = [part.get("text", part.get("value")) if isinstance(part, dict) else part for part in content]
        kinds = [str(part.get("type", "text")) for part in content if isinstance(part, dict)]
        if set(kinds) <= {"text"} and all(isinstance(text, str) for text in texts):
            return "".join(texts)
        raise DataError(f"{where} has parts that are not text, but {str(content)[:60]}")
    if not isinstance(content, str):
        raise DataError(f"{where} has no text as its content, but {str(content)[:60]!r}")
    return content


def _text(row: dict, key: str) -> str:
    value = row[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:  # NaN is no text
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{key} is not a text, but {str(value)[:60]!r}")
    return value


def _column(row: dict, column: str) -> object:
    if column not in row:
        raise DataError(f"columns names {column!r}; the row has {_keys(row)}")
    return row[column]


def _keys(row: dict) -> str:
    return ", ".join(map(str, list(row)[:8])) or "no keys at all"
