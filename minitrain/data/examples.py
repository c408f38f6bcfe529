"""The kinds of examples, the registry of row formats, and helpers that read fields of a data row."""

import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitrain.config.sections import DatasetConfig
from minitrain.errors import ConfigError, DataError, short

from .messages import (
    TRANSCRIPT,
    Messages,
    assistant,
    is_empty,
    parse_message,
    parse_messages,
    parse_tools,
    parse_transcript,
    user,
)


@dataclass(kw_only=True)
class Example:
    """What all kinds of examples have.

    Attributes:
        variables: What the chat template is given besides the messages, such as `tools`.
        unread: Keys of the row that its format does not use.
    """

    variables: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list, compare=False)


@dataclass
class Conversation(Example):
    """Messages; the assistant's are trained on."""

    messages: Messages


@dataclass
class PlainText(Example):
    """A text of which every token is trained on."""

    text: str


@dataclass
class Preference(Example):
    """Two responses to a prompt, one better than the other by at least `margin`."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float = 0.0


@dataclass
class UnpairedPreference(Example):
    """A response with a label: desirable or not."""

    prompt: Messages
    response: Messages
    desirable: bool


@dataclass
class ClassificationExample(Example):
    """A text or a pair of texts, with its class."""

    text: str
    text_pair: str | None
    label: str


@dataclass
class Rollout(Example):
    """A sampled response, as a string or as token ids, with its reward.

    Attributes:
        reward: NaN if the row has none.
        tokens: old_logps, ref_logps, values, advantages or returns -> one number per response token.
        truncated: Whether sampling was cut off; None: if the last token is not an end token.
    """

    prompt: Messages | list[int]
    response: str | list[int]
    reward: float
    tokens: dict[str, list[float]] = field(default_factory=dict)
    truncated: bool | None = None


@dataclass
class Prompt(Example):
    """Messages up to where a response begins, which is sampled during training."""

    messages: Messages


@dataclass
class RowFormat:
    kind: str  # a key of `EXAMPLE_COLUMNS`
    required: tuple[str, ...]
    convert: Callable[[dict, DatasetConfig], Example]


ROW_FORMATS: dict[str, RowFormat] = {}


def row_format(name: str, kind: str, *required: str):
    """Register a row format: a function that converts a data row with all `required` keys to an example.

    The first format that matches a row applies, in the order of registration.

    Args:
        name: The value of a data set's `type`.
        kind: The kind of examples that the function returns, a key of `EXAMPLE_COLUMNS`.
    """
    if kind not in EXAMPLE_COLUMNS:
        raise ConfigError(
            f"row format {name}: unknown kind {kind!r}. Use one of {', '.join(EXAMPLE_COLUMNS)}.", "usage"
        )

    def register(convert: Callable) -> Callable:
        ROW_FORMATS[name] = RowFormat(kind, required, convert)
        return convert

    return register


def row_formats_of(kind: str) -> dict[str, RowFormat]:
    return {name: each for name, each in ROW_FORMATS.items() if each.kind == kind}


def format_sources(kind: str, name: str | None) -> list[list]:
    """Return name, required keys and source code of each row format of a kind.

    This is part of a token cache's key, so that a new format also applies to rows that an older cache skipped.

    Args:
        name: The only format to return; None: all.
    """
    formats = [(each, one) for each, one in row_formats_of(kind).items() if name in (None, each)]
    return [[each, one.required, _source_code(one.convert)] for each, one in formats]


def _source_code(function: Callable) -> str:
    try:
        return inspect.getsource(function)
    except OSError:  # defined in an interactive session
        return function.__code__.co_code.hex()


def to_example(row: dict, dataset: DatasetConfig, kind: str = "conversation") -> Example:
    """Convert a data row to an example, by the format `dataset.type` or the first one that the row's keys match.

    Raises:
        DataError: The row cannot be used; the caller adds file and line.
    """
    row = TrackedRow(row)
    if dataset.columns:
        row = row | {name: _column(row, column, dataset.path) for name, column in dataset.columns.items()}
    if dataset.type is not None:
        name = dataset.type
        missing = [key for key in ROW_FORMATS[name].required if key not in row]
        if missing:
            raise DataError(f"type {name} requires the key {missing[0]!r}, got {keys_of(row)}", "invalid-row")
    else:
        name = _matching_format(dataset.columns, kind) or _matching_format(row, kind)
    if name is None:
        formats = "; ".join(f"{n}: {', '.join(s.required)}" for n, s in row_formats_of(kind).items())
        first, second = EXAMPLE_COLUMNS[kind]
        example = f"{{{first}: my_column, {second}: my_other_column}}"
        is_prompt = kind not in (*OF_TEXTS, "solution") and _matching_format(row, "prompt")
        online = ", or set rollout.num_generations to sample responses during training" if is_prompt else ""
        raise DataError(
            f"expected the keys of a {kind} format ({formats}), got {keys_of(row)}. "
            f"Map your columns, for example columns: {example}{online}{_header_hint(dataset.path)}",
            "invalid-row",
        )
    templated = dataset.prompt_template or dataset.response_template
    if templated and name not in TEMPLATED:
        raise DataError(
            f"prompt_template and response_template have no effect on rows of type {name}. Remove them", "no-effect"
        )
    if name not in WITH_DOCUMENTS and (dataset.p_oracle < 1 or dataset.n_distractors is not None):
        raise DataError(f"p_oracle and n_distractors have no effect on rows of type {name}. Remove them", "no-effect")
    example = ROW_FORMATS[name].convert(row, dataset)
    if kind not in OF_TEXTS:
        if media := [key for key in MEDIA if row.get(key) not in EMPTY]:
            raise DataError(f"{media[0]}: minitrain trains on text only. Remove the row", "invalid-row")
        example.variables = variables_of(row, dataset, has_documents=name in WITH_DOCUMENTS) | example.variables
    example.unread += row.unread()
    return example


def variables_of(row: dict, dataset: DatasetConfig, has_documents: bool = False) -> dict[str, Any]:
    """Return what a chat template reads of a row besides its messages: tools, documents and its own arguments.

    Args:
        has_documents: Whether `documents` are a part of the prompt.
    """
    variables = row.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise DataError(f"chat_template_kwargs: expected an object, got {short(variables)!r}", "invalid-row")
    key = "tools" if row.get("tools") else "functions"
    if tools := row.get(key) or tools_of(dataset):
        variables = variables | {"tools": parse_tools(tools, key)}
    if not has_documents and (documents := row.get("documents")):
        variables = variables | {"documents": documents}
    return variables


def tools_of(dataset: DatasetConfig) -> Any:
    """Return the tools of rows that have none. Raises DataError for a file that cannot be read."""
    if not isinstance(dataset.tools, str):
        return dataset.tools
    try:
        return _read_tools(dataset.tools)
    except (OSError, ValueError) as error:
        raise DataError(f"tools: {dataset.tools} is not a readable JSON file: {error}", "unreadable") from None


@functools.lru_cache(maxsize=16)
def _read_tools(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


class TrackedRow(dict):
    """A data row that knows which of its keys were read."""

    def __init__(self, row: dict, read: set[str] | None = None):
        super().__init__(row)
        self.read = set() if read is None else read

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def unread(self) -> list[str]:
        return [key for key, value in self.items() if key not in self.read and value not in EMPTY]

    def __or__(self, other: dict) -> "TrackedRow":
        return TrackedRow(super().__or__(other), self.read)


# Kind of examples -> two keys of one of its formats, for the example of `columns` in a message.
EXAMPLE_COLUMNS = {
    "conversation": ("prompt", "response"),
    "preference": ("chosen", "rejected"),
    "unpaired_preference": ("completion", "label"),
    "classification": ("text", "label"),
    "solution": ("steps", "labels"),
    "retrieval": ("query", "positive"),
    "ranking": ("query", "positive"),
    "rollout": ("response", "reward"),
    "prompt": ("prompt", "answer"),
}
OF_TEXTS = ("classification", "retrieval", "ranking")  # these use no chat template
EMPTY = (None, "", [], {})
MEDIA = ("images", "videos", "audios")  # columns of data sets for models that read more than text
WITH_DOCUMENTS = ("raft", "raft_context", "raft_distractors")
TEMPLATED = ("prompt_response", "prompt_completion", "question_answer", "query_response", "alpaca", *WITH_DOCUMENTS)
TEMPLATED += ("prompt", "prompt_question", "prompt_instruction", "prompt_query")


def _matching_format(keys: Mapping, kind: str) -> str | None:
    formats = ROW_FORMATS.items() if keys else ()
    return next((name for name, one in formats if one.kind == kind and all(key in keys for key in one.required)), None)


def _column(row: dict, column: str, path: str) -> object:
    if column not in row:
        raise DataError(f"columns: unknown column {column!r}, got {keys_of(row)}{_header_hint(path)}", "wrong-column")
    return row[column]


def _header_hint(path: str) -> str:
    """Return a hint for tables, whose keys are wrong if the file has no header."""
    tabular = path.removesuffix(".gz").lower().endswith((".csv", ".tsv"))
    return ". The first line of the file must be a header" if tabular else ""


# ------------------------------------------------------------------------------------------- fields of a data row


def keys_of(row: dict) -> str:
    return ", ".join(map(str, list(row)[:8])) or "no keys"


def text_of(row: dict, key: str) -> str:
    value = row[key]
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{key}: expected a string, got {short(value)!r}", "invalid-row")
    return value


def number_of(row: dict, key: str) -> float:
    value = row[key]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # OverflowError: an integer above 1e308
        raise DataError(f"{key}: expected a number, got {short(value)!r}", "invalid-row") from None
    if not -float("inf") < number < float("inf"):
        raise DataError(f"{key}: expected a finite number, got {value}", "invalid-row")
    return number


def preference_of(row: dict, chosen: Any, rejected: Any) -> Preference:
    """Return a preference. Its prompt has a column, or is the common beginning of both responses."""
    chosen, rejected = response_of(chosen, "chosen"), response_of(rejected, "rejected")
    prompt = prompt_of(row)
    if not prompt:
        shortest = min(len(chosen), len(rejected))
        n = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), shortest)
        n = min(n, shortest - 1)  # each side keeps a response
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    elif chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:  # the prompt is in all three columns
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        check_ends_with_assistant(turns, key)
    if chosen == rejected:
        raise DataError("chosen and rejected are the same", "same-answers")
    return Preference(prompt, chosen, rejected, number_of(row, "margin") if "margin" in row else 0.0)


def check_ends_with_assistant(turns: Messages, key: str) -> None:
    if not turns or turns[-1]["role"] != "assistant" or is_empty(turns[-1]):
        raise DataError(f"{key}: expected a turn of the assistant at the end", "no-answer")


def prompt_of(row: dict) -> Messages:
    """Return the prompt's turns, from whichever column has them; none if no column does."""
    turns = system_of(row)
    for key in ("prompt", "conversations", "messages", "question", "instruction"):
        if key not in row:
            continue
        if isinstance(row[key], list):
            return turns + parse_messages(row[key], key)
        text = text_of(row, key)
        if key == "instruction" and row.get("input"):
            text += "\n" + text_of(row, "input")
        return [*turns, user(text)]
    return []


def system_of(row: dict) -> Messages:
    """Return the system turn that a row has a column for, if any."""
    return [{"role": "system", "content": text_of(row, "system")}] if row.get("system") else []


def alpaca_history(row: dict) -> Messages:
    """Return the turns of the column `history`, a list of [instruction, output]."""
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history: expected a list of pairs, got {short(history)!r}", "invalid-row")
    turns: Messages = []
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"history[{i}]: expected [instruction, output], two strings, got {short(pair)!r}", "invalid-row"
            )
        turns += [user(pair[0]), assistant(pair[1])]
    return turns


def response_of(value: Any, key: str) -> Messages:
    """Return the turns of a response, given as a string, one turn, a list of turns, or a transcript."""
    if isinstance(value, dict):
        return [parse_message(value, key)]
    if isinstance(value, list):
        return parse_messages(value, key)
    if isinstance(value, str) and value.startswith(TRANSCRIPT):
        return parse_transcript(value)
    return [assistant(text_of({key: value}, key))]


def fill(template: str, row: dict, name: str) -> str:
    """Fill columns into a template. Braces in the columns' own text stay as they are."""

    def value(match: re.Match) -> str:
        if match[1] not in row:
            raise DataError(f"{name}: unknown column {match[1]!r}, got {keys_of(row)}", "wrong-column")
        return text_of(row, match[1])

    return re.sub(r"\{(\w+)\}", value, template)
