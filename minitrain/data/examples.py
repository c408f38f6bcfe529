"""Rows -> records: the kinds of example there are, and the schemas that people keep their data in.

To add a schema: a function decorated with `schema` in the file of its kind, and its test.
"""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minitrain.config.schema import DatasetConfig
from minitrain.errors import ConfigError, DataError, short

Messages = list[dict[str, str]]  # each with `role` (system, user, assistant, tool) and `content`

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

TRANSCRIPT = "\n\nHuman:"  # how a text begins that is a conversation


@dataclass
class Conversation:
    """Messages of which those of the assistant are learned."""

    messages: Messages


@dataclass
class PlainText:
    """A text that is learned whole."""

    text: str


@dataclass
class Preference:
    """Two continuations of a prompt, one better than the other by at least `margin`."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float = 0.0


@dataclass
class UnpairedPreference:
    """An answer that somebody wanted, or did not."""

    prompt: Messages
    response: Messages
    desirable: bool


@dataclass
class ClassificationExample:
    """A text, or a pair of them, and what it was judged to be."""

    text: str
    text_pair: str | None
    label: str


@dataclass
class Rollout:
    """An answer that a policy gave, as texts or as token ids, and what it earned.

    `tokens` maps old_logps, ref_logps, values, advantages or returns to one number for each token of the response.
    A row without a reward has NaN. `truncated` says whether the sampling was cut off; None leaves it to the last token.
    """

    prompt: Messages | list[int]
    response: str | list[int]
    reward: float
    tokens: dict[str, list[float]] = field(default_factory=dict)
    truncated: bool | None = None


Record = Conversation | PlainText | Preference | UnpairedPreference | ClassificationExample | Rollout


@dataclass
class Schema:
    kind: str  # conversation | preference | unpaired_preference | classification | rollout
    required: tuple[str, ...]
    convert: Callable[[dict, DatasetConfig], Record]


SCHEMAS: dict[str, Schema] = {}


def schema(name: str, kind: str, *required: str):
    """Register a converter for rows that have all the `required` keys; earlier ones are tried first.

    Args:
        kind: The type of example it makes, a key of `MAPPED`.
    """
    if kind not in MAPPED:
        raise ConfigError(f"schema {name}: no examples of the type {kind!r}. Use one of {', '.join(MAPPED)}.", "usage")

    def register(convert: Callable) -> Callable:
        SCHEMAS[name] = Schema(kind, required, convert)
        return convert

    return register


def schemas_of(kind: str) -> dict[str, Schema]:
    return {name: one for name, one in SCHEMAS.items() if one.kind == kind}


def format_sources(kind: str, name: str | None) -> list[list]:
    """Return what determines how rows are read: name, keys and code of each schema of a kind, in order.

    Token caches have it in their key, so that rows which an old cache left out are read by a schema that is new.

    Args:
        name: The only schema that is used; None for all.
    """
    return [
        [each, one.required, _source(one.convert)] for each, one in schemas_of(kind).items() if name in (None, each)
    ]


def _source(function: Callable) -> str:
    try:
        return inspect.getsource(function)
    except OSError:  # it was typed into an interpreter
        return function.__code__.co_code.hex()


def to_record(row: dict, dataset: DatasetConfig, kind: str = "conversation") -> Record:
    """The record in a row, by `dataset.type` or by the row's keys.

    Raises DataError with the reason; the caller adds file and line.
    """
    known = schemas_of(kind)
    if dataset.columns:
        row = row | {name: _column(row, column, dataset.path) for name, column in dataset.columns.items()}
    if dataset.type is not None:
        name = dataset.type
        missing = [key for key in known[name].required if key not in row]
        if missing:
            raise DataError(f"type {name} needs the key {missing[0]!r}; the row has {keys_of(row)}", "invalid-row")
    else:
        name = _recognise(dataset.columns, known) or _recognise(row, known)
    if name is None:
        kinds = "; ".join(f"{n}: {', '.join(s.required)}" for n, s in known.items())
        first, second = MAPPED[kind]
        example = f"{{{first}: my_column, {second}: my_other_column}}"
        raise DataError(
            f"no known schema of {kind} rows has the keys {keys_of(row)}. Known are ({kinds}). "
            f"Map your columns, for example columns: {example}{_of_header(dataset.path)}",
            "invalid-row",
        )
    templated = dataset.prompt_template or dataset.response_template
    if templated and name not in TEMPLATED:
        raise DataError(f"prompt_template and response_template do not apply to rows of type {name}", "no-effect")
    if name not in WITH_DOCUMENTS and (dataset.p_oracle < 1 or dataset.n_distractors is not None):
        raise DataError(f"p_oracle and n_distractors do not apply to rows of type {name}", "no-effect")
    return known[name].convert(row, dataset)


# Columns that are shown as an example of a mapping.
MAPPED = {
    "conversation": ("prompt", "response"),
    "preference": ("chosen", "rejected"),
    "unpaired_preference": ("completion", "label"),
    "classification": ("text", "label"),
    "rollout": ("response", "reward"),
}
WITH_DOCUMENTS = ("raft", "raft_context", "raft_distractors")
TEMPLATED = ("prompt_response", "question_answer", "query_response", "alpaca", *WITH_DOCUMENTS)


def _recognise(keys: dict, known: dict[str, Schema]) -> str | None:
    return next((name for name, s in known.items() if all(key in keys for key in s.required)), None)


def _column(row: dict, column: str, path: str) -> object:
    if column not in row:
        raise DataError(f"columns names {column!r}; the row has {keys_of(row)}{_of_header(path)}", "wrong-column")
    return row[column]


def _of_header(path: str) -> str:
    """Where keys come from that may be no keys at all."""
    tabular = path.removesuffix(".gz").lower().endswith((".csv", ".tsv"))
    return ". The keys are the first line of the file, which has to be a header" if tabular else ""


# ------------------------------------------------------------------------------------------- reading what is in a row


def keys_of(row: dict) -> str:
    return ", ".join(map(str, list(row)[:8])) or "no keys at all"


def text_of(row: dict, key: str) -> str:
    value = row[key]
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{key} is not a text, but {short(value)!r}", "invalid-row")
    return value


def number_of(row: dict, key: str) -> float:
    value = row[key]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # OverflowError: of an integer beyond 1e308
        raise DataError(f"{key} is not a number, but {short(value)!r}", "invalid-row") from None
    if not -float("inf") < number < float("inf"):
        raise DataError(f"{key} is not a finite number, but {value}", "invalid-row")
    return number


def turns_of(turns: object, key: str) -> Messages:
    """A list of objects with role/content or from/value as messages."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{key} is not a list of turns", "invalid-row")
    return [turn_of(turn, f"{key}[{i}]") for i, turn in enumerate(turns)]


def turn_of(turn: object, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is not an object with a role and a content", "invalid-row")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where} has the role {short(role)!r}; known are {', '.join(ROLES)}", "invalid-row")
    content = turn.get("content", turn.get("value"))
    return {"role": ROLES[role], "content": _content(content, where)}


def transcript_of(text: str) -> Messages:
    """Turns of a text as in Anthropic's HH data: each stands behind an empty line and Human: or Assistant:."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    return [{"role": ROLES[who.lower()], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def compared(row: dict, chosen: Any, rejected: Any) -> Preference:
    """A preference. The prompt stands in a column of its own, or is what both continuations begin with."""
    good, bad = continuation_of(chosen, "chosen"), continuation_of(rejected, "rejected")
    prompt = prompt_of(row)
    if not prompt:
        n = next((i for i, (a, b) in enumerate(zip(good, bad)) if a != b), min(len(good), len(bad)))
        n = min(n, len(good) - 1, len(bad) - 1)
        prompt, good, bad = good[:n], good[n:], bad[n:]
    elif good[: len(prompt)] == prompt and bad[: len(prompt)] == prompt:  # it is in all three
        good, bad = good[len(prompt) :], bad[len(prompt) :]
    for key, turns in (("chosen", good), ("rejected", bad)):
        if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
            raise DataError(f"{key} does not end with words of the assistant", "no-answer")
    if good == bad:
        raise DataError("chosen and rejected are the same", "same-answers")
    return Preference(prompt, good, bad, number_of(row, "margin") if "margin" in row else 0.0)


def prompt_of(row: dict) -> Messages:
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


def continuation_of(value: Any, key: str) -> Messages:
    """An answer as a text, as one turn, or as turns: a list of them, or a transcript."""
    if isinstance(value, dict):
        return [turn_of(value, key)]
    if isinstance(value, list):
        return turns_of(value, key)
    if isinstance(value, str) and value.startswith(TRANSCRIPT):
        return transcript_of(value)
    return [assistant(text_of({key: value}, key))]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def fill(template: str, row: dict, name: str) -> str:
    """Puts columns into a template. Text that comes from the data is never read as a template itself."""

    def value(match: re.Match) -> str:
        if match[1] not in row:
            raise DataError(f"{name} names the column {match[1]!r}; the row has {keys_of(row)}", "wrong-column")
        return text_of(row, match[1])

    return re.sub(r"\{(\w+)\}", value, template)


def _content(content: Any, where: str) -> str:
    """A text, or a list of text parts as multimodal data sets write it."""
    if isinstance(content, list):
        texts = [part.get("text", part.get("value")) if isinstance(part, dict) else part for part in content]
        kinds = [str(part.get("type", "text")) for part in content if isinstance(part, dict)]
        if set(kinds) <= {"text"} and all(isinstance(text, str) for text in texts):
            return "".join(texts)
        raise DataError(f"{where} has parts that are not text, but {short(content)}", "invalid-row")
    if not isinstance(content, str):
        raise DataError(f"{where} has no text as its content, but {short(content)!r}", "invalid-row")
    return content
