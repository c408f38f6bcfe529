"""What a row has to be found in its text: no template may lose a field without a word."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .counts import PROMPT, TRAINED, UNTRAINED, UNUSED
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


def uses_of_turn(message: Message, trained: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield (field, FIELD:USE) of what a turn has besides its content.

    Args:
        trained: The part of the text that is trained on for this turn.
        text: The full text.
    """
    if message["role"] == "tool":
        yield "result", f"results:{PROMPT if _has(text, message['content'].strip()) else UNUSED}"
    if message["role"] != "assistant":
        return
    if reasoning := split_reasoning(message)[0]:
        uses = ((trained, TRAINED), (text, PROMPT))
        yield "reasoning", f"reasoning:{next((use for part, use in uses if _has(part, reasoning)), UNUSED)}"
    for i, call in enumerate(message.get("tool_calls", ())):
        uses = ((trained, TRAINED), (text, PROMPT))
        use = next((use for part, use in uses if not any(_missing_of_call(call, part))), UNUSED)
        yield f"call {i}", f"calls:{use}"
    if "weight" in message:
        yield "weight", f"weights:{UNTRAINED if not message['weight'] else TRAINED if trained else UNUSED}"


def uses_of_variables(variables: Mapping[str, Any], text: str) -> Iterator[tuple[str, str]]:
    """Yield (field, FIELD:USE) of each tool and document."""
    for i, tool in enumerate(variables.get("tools") or ()):
        yield f"tool {i}", f"tools:{PROMPT if tool['function']['name'] in text else UNUSED}"
    documents = variables.get("documents") or []
    for i, document in enumerate(documents if isinstance(documents, list) else [documents]):
        values = [*document.values()] if isinstance(document, dict) else document
        longest = max((leaf for leaf in leaves(values) if isinstance(leaf, str)), key=len, default="")
        yield f"document {i}", f"documents:{PROMPT if longest and _has(text, longest.strip()) else UNUSED}"


def _has(text: str, value: Any) -> bool:
    """Return whether a text has a value, as it is or in the ways in which templates write JSON and XML."""
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    return value in text or any(_json(value, ascii_only) in text for ascii_only in (False, True))


def _json(value: str, ascii_only: bool) -> str:
    return json.dumps(value, ensure_ascii=ascii_only)[1:-1]
