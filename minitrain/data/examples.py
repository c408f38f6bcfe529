"""The kinds of examples, the registry of row formats, and helpers that read fields of a data row."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minitrain.config.sections import DatasetConfig
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

TRANSCRIPT = "\n\nHuman:"  # start of a string that holds a conversation


@dataclass
class Conversation:
    """Messages; the assistant's are trained on."""

    messages: Messages


@dataclass
class PlainText:
    """A text of which every token is trained on."""

    text: str


@dataclass
class Preference:
    """Two responses to a prompt, one better than the other by at least `margin`."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float = 0.0


@dataclass
class UnpairedPreference:
    """A response with a label: desirable or not."""

    prompt: Messages
    response: Messages
    desirable: bool


@dataclass
class ClassificationExample:
    """A text or a pair of texts, with its class."""

    text: str
    text_pair: str | None
    label: str


@dataclass
class Rollout:
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


Example = Conversation | PlainText | Preference | UnpairedPreference | ClassificationExample | Rollout


@dataclass
class RowFormat:
    kind: str  # conversation | preference | unpaired_preference | classification | rollout
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
    known = row_formats_of(kind)
    if dataset.columns:
        row = row | {name: _column(row, column, dataset.path) for name, column in dataset.columns.items()}
    if dataset.type is not None:
        name = dataset.type
        missing = [key for key in known[name].required if key not in row]
        if missing:
            raise DataError(f"type {name} requires the key {missing[0]!r}, got {keys_of(row)}", "invalid-row")
    else:
        name = _matching_format(dataset.columns, known) or _matching_format(row, known)
    if name is None:
        formats = "; ".join(f"{n}: {', '.join(s.required)}" for n, s in known.items())
        first, second = EXAMPLE_COLUMNS[kind]
        example = f"{{{first}: my_column, {second}: my_other_column}}"
        raise DataError(
            f"expected the keys of a {kind} format ({formats}), got {keys_of(row)}. "
            f"Map your columns, for example columns: {example}{_header_hint(dataset.path)}",
            "invalid-row",
        )
    templated = dataset.prompt_template or dataset.response_template
    if templated and name not in TEMPLATED:
        raise DataError(
            f"prompt_template and response_template have no effect on rows of type {name}. Remove them", "no-effect"
        )
    if name not in WITH_DOCUMENTS and (dataset.p_oracle < 1 or dataset.n_distractors is not None):
        raise DataError(f"p_oracle and n_distractors have no effect on rows of type {name}. Remove them", "no-effect")
    return known[name].convert(row, dataset)


# Kind of examples -> two keys of one of its formats, for the example of `columns` in a message.
EXAMPLE_COLUMNS = {
    "conversation": ("prompt", "response"),
    "preference": ("chosen", "rejected"),
    "unpaired_preference": ("completion", "label"),
    "classification": ("text", "label"),
    "rollout": ("response", "reward"),
}
WITH_DOCUMENTS = ("raft", "raft_context", "raft_distractors")
TEMPLATED = ("prompt_response", "question_answer", "query_response", "alpaca", *WITH_DOCUMENTS)


def _matching_format(keys: dict, known: dict[str, RowFormat]) -> str | None:
    return next((name for name, s in known.items() if all(key in keys for key in s.required)), None)


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


def turns_of(turns: object, key: str) -> Messages:
    """Return turns, objects with role/content or from/value, as messages."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{key}: expected a list of turns, got {short(turns)!r}", "invalid-row")
    return [turn_of(turn, f"{key}[{i}]") for i, turn in enumerate(turns)]


def turn_of(turn: object, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: expected an object with role and content, got {short(turn)!r}", "invalid-row")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: expected one of the roles {', '.join(ROLES)}, got {short(role)!r}", "invalid-row")
    content = turn.get("content", turn.get("value"))
    return {"role": ROLES[role], "content": _content(content, where)}


def transcript_of(text: str) -> Messages:
    """Return the turns of a transcript as in Anthropic's HH data: an empty line and Human: or Assistant: begin each."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    return [{"role": ROLES[role.lower()], "content": text.strip()} for role, text in zip(parts[::2], parts[1::2])]


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
    if not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
        raise DataError(f"{key}: expected a turn of the assistant at the end", "no-answer")


def prompt_of(row: dict) -> Messages:
    """Return the prompt's turns, from whichever column has them; none if no column does."""
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


def response_of(value: Any, key: str) -> Messages:
    """Return the turns of a response, given as a string, one turn, a list of turns, or a transcript."""
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
    """Fill columns into a template. Braces in the columns' own text stay as they are."""

    def value(match: re.Match) -> str:
        if match[1] not in row:
            raise DataError(f"{name}: unknown column {match[1]!r}, got {keys_of(row)}", "wrong-column")
        return text_of(row, match[1])

    return re.sub(r"\{(\w+)\}", value, template)


def _content(content: Any, where: str) -> str:
    """Return a string, given as such or as a list of text parts, as in multimodal data sets."""
    if isinstance(content, list):
        texts = [part.get("text", part.get("value")) if isinstance(part, dict) else part for part in content]
        kinds = [str(part.get("type", "text")) for part in content if isinstance(part, dict)]
        if set(kinds) <= {"text"} and all(isinstance(text, str) for text in texts):
            return "".join(texts)
        raise DataError(f"{where}: expected text parts only, got {short(content)}", "invalid-row")
    if not isinstance(content, str):
        raise DataError(f"{where}: expected a string as content, got {short(content)!r}", "invalid-row")
    return content
