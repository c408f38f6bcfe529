"""Prompts from data rows and files, with what else the chat template is given: tools, documents and its arguments."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minitrain.config.sections import DatasetConfig
from minitrain.data.examples import TrackedRow, alpaca_history, fill, system_of, variables_of
from minitrain.data.files import FORMATS, DataRow, check_is_file, format_of, read_rows
from minitrain.data.formats_raft import ANSWERS, documents_of, raft_prompt
from minitrain.data.messages import Messages, parse_messages, parse_tools, user
from minitrain.data.rendering import ChatRenderer
from minitrain.errors import ConfigError, DataError

REFERENCES = ("response", "output", "completion", "chosen", "rejected", "label", *ANSWERS)


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        where: Its location, for error messages.
        row: Its data row.
        messages: Its conversation, up to the response.
        variables: What the chat template is given besides, such as `tools`.
        unread: Keys of the row that are not used.
    """

    where: str
    row: dict
    messages: Messages
    variables: dict[str, Any]
    unread: list[str]


def make_prompt(where: str, row: dict, template: str | None = None, tools: Any = None) -> Prompt:
    """Return the prompt of a row.

    Args:
        where: The location of the row.
        row: The row.
        template: The prompt_template of training.
        tools: Tools of a row that has none.

    Raises:
        DataError: The row has no prompt.
    """
    tracked = TrackedRow(row)
    messages = messages_of(tracked, template)
    variables = variables_of(tracked, DatasetConfig(path="", tools=tools), "documents" in tracked.read)
    unread = [key for key in tracked.unread() if key not in REFERENCES]
    return Prompt(where, row, messages, variables, unread)


def read_prompts(path: Path, template: str | None = None, tools: Any = None) -> Iterator[Prompt]:
    """Yield the prompts of a .txt file, one per line, or of rows with one of the keys of `messages_of`.

    Args:
        path: The file. It may be a training file: the last assistant turn of a conversation is dropped.
        template: The prompt_template of training.
        tools: Tools of rows that have none.

    Raises:
        DataError: The file cannot be read, or a row has no prompt.
    """
    check_is_file(path)
    if path.suffix == ".txt":
        rows = _text_rows(path)
    elif format_of(path) in FORMATS:
        rows = read_rows(path)
    else:
        raise DataError(f"{path}: expected a .txt, .{', .'.join(FORMATS)} file. Convert it.", "wrong-format")
    for line, row in rows:
        where = f"{path}:{line}"
        if isinstance(row, DataError):
            raise row.at(where)
        try:
            yield make_prompt(where, row, template, tools)
        except DataError as error:
            raise error.at(where) from None


def _text_rows(path: Path) -> Iterator[DataRow]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError:
                raise DataError(f"{path}:{number}: invalid UTF-8. Save the file as UTF-8.", "invalid-text") from None
            if text.strip():
                yield number, {"prompt": text}


def messages_of(row: dict, template: str | None = None) -> Messages:
    """Return the conversation of a row up to the response, as in training. Raises DataError.

    A question with documents (RAFT) becomes the prompt of training, always with the oracle document.
    """
    for key in ("messages", "conversations", "prompt"):
        if key in row and (key != "prompt" or isinstance(row[key], list)):
            return system_of(row) + _prompt_messages(row[key], key, template)
    if "prompt" not in row and (documents := documents_of(row)) is not None:
        return [user(raft_prompt(row, documents, DatasetConfig(path="", prompt_template=template)))]
    for key in ("prompt", "question", "instruction", "query"):
        if isinstance(row.get(key), str):
            text = row[key] + (f"\n{row['input']}" if key == "instruction" and row.get("input") else "")
            text = text if template is None else fill(template, row | {"prompt": text}, "--prompt-template")
            return system_of(row) + (alpaca_history(row) if key == "instruction" else []) + [user(text)]
    message = "expected messages, or a string with the key prompt, question, instruction or query, got the keys"
    raise DataError(f"{message} {', '.join(row)}. Correct the row.", "invalid-row")


def _prompt_messages(value: object, key: str, template: str | None) -> Messages:
    messages = parse_messages(value, key)
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not messages:
        raise DataError(f"{key}: has no user turn. Add one.", "invalid-row")
    if template is not None:
        raise DataError("--prompt-template: has no effect on messages. Remove it.", "no-effect")
    return messages


def read_tools(path: str) -> list[dict]:
    """Return the tools in a JSON file. Raises ConfigError."""
    try:
        tools = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--tools: {path} cannot be read: {error.strerror}. Check the path.", "unreadable") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--tools: {path} is not JSON: {error}. Correct the file.", "invalid-json") from None
    try:
        tools = parse_tools(tools, f"--tools: {path}")
    except DataError as error:
        raise ConfigError(f"{error.message}. Correct the file.", error.code) from None
    if not tools:
        raise ConfigError(f"--tools: {path} has no tools. Add one, or remove the option.", "no-data")
    return tools


def python_variables(
    renderer: ChatRenderer, tools: Sequence[Mapping[str, Any]] | None, chat_template_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what a chat template is given besides messages, from arguments in Python. Raises ConfigError."""
    variables = dict(chat_template_kwargs or {})
    renderer.check(variables)
    try:
        return variables | ({"tools": parse_tools(tools, "tools")} if tools else {})
    except DataError as error:
        raise ConfigError(f"{error.message}. Describe each as in OpenAI's format.", "wrong-type") from None


def read_documents(paths: list[str]) -> list[str]:
    """Return the texts of files, in their order. Raises DataError."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8-sig").strip())
        except UnicodeDecodeError:
            raise DataError(f"{path}: invalid UTF-8. Save the file as UTF-8.", "invalid-text") from None
        except OSError as error:
            message = f"{path}: cannot be read: {error.strerror}. Check the path and its permissions."
            raise DataError(message, "unreadable") from None
        if not texts[-1]:
            raise DataError(f"{path}: is empty. Remove it.", "no-data")
    return texts
