"""What a row has to be found in its text: no template may lose a field without a word."""

import json
from collections.abc import Iterator
from typing import Any

from .messages import Message, Messages, leaves, split_reasoning

MIN_REPEATED = 12  # characters; shorter reasoning may occur in an answer by chance


def missing_fields(message: Message, text: str) -> list[str]:
    """Return the names of the fields of an answer that a text does not have, or has twice.

    Args:
        text: What is trained on, as it was rendered.
    """
    reasoning, content = split_reasoning(message)
    fields = [("content", content)]
    if reasoning:
        fields.append(("reasoning", reasoning))
    missing = [name for name, value in fields if not _has(text, value)]
    if reasoning and "reasoning" not in missing and len(reasoning) >= MIN_REPEATED:
        elsewhere = content + json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
        if text.count(reasoning) > 1 + elsewhere.count(reasoning):
            missing.append("reasoning (which it has twice)")
    return missing + [name for call in message.get("tool_calls", ()) for name in _missing_of_call(call, text)]


def _missing_of_call(call: dict, text: str) -> Iterator[str]:
    name = call["function"]["name"]
    if not _has(text, name):
        yield f"the call of {name}"
    elif not all(_has(text, leaf) for leaf in leaves(call["function"]["arguments"])):
        yield f"arguments of {name}"


def missing_context(messages: Messages, tools: list[dict], text: str) -> list[str]:
    """Return what the model is to read and the full text does not have: contents of turns, and names of tools."""
    missing = [
        f"content of the {message['role']} turn"
        for message in messages
        if not _has(text, split_reasoning(message)[1] if message["role"] == "assistant" else message["content"].strip())
    ]
    return missing + [f"tool {tool['function']['name']}" for tool in tools if tool["function"]["name"] not in text]


def _has(text: str, value: Any) -> bool:
    """Return whether a text has a value, as it is or in the ways in which templates write JSON and XML."""
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    return value in text or any(_json(value, ascii_only) in text for ascii_only in (False, True))


def _json(value: str, ascii_only: bool) -> str:
    return json.dumps(value, ensure_ascii=ascii_only)[1:-1]
