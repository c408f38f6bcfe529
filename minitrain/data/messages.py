"""Turns of a row -> messages in one form, with every key kept: content, reasoning, tool calls, weight and the rest.

A message is a dict with `role` and `content`. It may have `reasoning_content` (a string), `tool_calls` (a list in
OpenAI's format whose arguments are objects), `weight` (a number) and other keys, which the chat template may read.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from minitrain.errors import DataError, short

Message = dict[str, Any]
Messages = list[Message]

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Names of a turn's weight: OpenAI's, LLaMA-Factory's, axolotl's two, and ms-swift's, which is true or false.
WEIGHT_KEYS = ("weight", "loss_weight", "train", "training", "loss")
# Type of a part of a content -> the field of a message that it belongs to, in the order in which templates write these.
PART_FIELDS = {
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
    "text": "content",
    "tool_call": "tool_calls",
    "tool_calls": "tool_calls",
}
TRANSCRIPT = "\n\nHuman:"  # the beginning of a string that is a dialogue
THINK_END = "</think>"
# Characters of private use, which no text of a data set should have: the borders of a content, and special tokens that
# are ordinary text.
OPEN, CLOSE, LITERAL = "\ue0f0", "\ue0f1", "\ue0f2"


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def is_empty(message: Message) -> bool:
    """Return whether a message has no content, no reasoning and no calls."""
    return not (message["content"].strip() or message.get("reasoning_content") or message.get("tool_calls"))


def is_trained_on(message: Message) -> bool:
    """Return whether the loss may include a message: an assistant's whose weight is not 0."""
    return message["role"] == "assistant" and message.get("weight", 1.0) > 0


def split_reasoning(message: Message) -> tuple[str, str]:
    """Return (reasoning, content) of a message, also where the content has both, as in `<think>a</think>b`."""
    reasoning, content = message.get("reasoning_content", ""), message["content"]
    if not reasoning and THINK_END in content:
        before, _, content = content.rpartition(THINK_END)
        reasoning = before.rpartition("<think>")[2]
    return reasoning.strip(), content.strip()


def parse_messages(turns: Any, key: str) -> Messages:
    """Return a list of turns, each with role/content or from/value, as messages.

    Calls that follow a turn of the assistant, or other calls, join its message, as in rows of ShareGPT's format.

    Args:
        key: What errors call the list.

    Raises:
        DataError: The value is not a list of turns.
    """
    turns = parse_json(turns) if isinstance(turns, str) and turns.lstrip().startswith("[") else turns
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{key}: expected a list of turns, got {short(turns)!r}", "invalid-row")
    messages: Messages = []
    for i, turn in enumerate(turns):
        message = parse_message(turn, f"{key}[{i}]")
        if messages and _is_call(turn) and _joins(message, messages[-1]):
            calls = [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]
            messages[-1] |= message | {"content": messages[-1]["content"], "tool_calls": calls}
        else:
            messages.append(message)
    return messages


def _is_call(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role", turn.get("from")) == "function_call"


def _joins(call: Message, previous: Message) -> bool:
    """Return whether a message that only calls is a part of the one before."""
    is_thought = "reasoning_content" in call
    return previous["role"] == "assistant" and call.get("weight") == previous.get("weight") and not is_thought


def parse_message(turn: Any, where: str) -> Message:
    """Return a turn as a message. Raises DataError for a turn that cannot be used.

    Args:
        where: What errors call the turn.
    """
    if not isinstance(turn, dict):
        raise DataError(f"{where}: expected an object with role and content, got {short(turn)!r}", "invalid-row")
    turn = {name: value for name, value in turn.items() if value is not None}  # tables fill missing keys with null
    role_key = "role" if "role" in turn else "from"
    role = turn.pop(role_key, None)
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: expected one of the roles {', '.join(ROLES)}, got {short(role)!r}", "invalid-row")
    content = turn.pop("content" if "content" in turn else "value", None)
    message: Message = {"role": ROLES[role], "content": ""}
    parts: Message = {"content": ""}
    if role == "function_call":
        parts |= _call_and_reasoning(content)
    elif isinstance(content, list) and (message["role"] != "tool" or all(map(_is_part, content))):
        parts |= _parts(content, where)
    else:
        parts["content"] = content
    content = parts.pop("content")
    if message["role"] == "assistant":
        if twice := [name for name in parts if name in turn]:
            raise DataError(f"{where}: has {twice[0]} twice, as a key and in the content", "invalid-row")
        turn |= parts
        message |= _answer_fields(turn, where)
    else:
        turn = {name: value for name, value in (turn | parts).items() if name not in WEIGHT_KEYS or value}
    if message["role"] == "tool" and not isinstance(content, str | None):
        content = json.dumps(content, ensure_ascii=False)  # a result that is not yet text
    if content is not None or is_empty(message):
        if not isinstance(content, str):
            raise DataError(f"{where}: expected a string as content, got {short(content)!r}", "invalid-row")
        message["content"] = content
    return message | turn


def _answer_fields(turn: dict, where: str) -> Message:
    """Take what an answer has besides its content out of a turn."""
    fields: Message = {}
    given = [turn.pop(name) for name in REASONING_KEYS if name in turn]
    if different := [value for value in given if value != given[0] or not isinstance(value, str)]:
        raise DataError(f"{where}: expected one string of reasoning, got {short(different[0])!r}", "invalid-row")
    if given and given[0].strip():
        fields["reasoning_content"] = given[0]
    calls = turn.pop("tool_calls", None) or turn.pop("function_call", None)
    turn.pop("function_call", None) if calls else None
    if calls:
        fields["tool_calls"] = parse_calls(calls, f"{where}.tool_calls")
    names = [name for name in WEIGHT_KEYS if name in turn and (name != "loss" or isinstance(turn[name], bool))]
    weights = [_weight(turn.pop(name), f"{where}.{name}") for name in names]
    if "train_detail" in turn:
        raise DataError(f"{where}.train_detail: a turn has one weight. Remove it, or set train", "invalid-row")
    if len(set(weights)) > 1:
        raise DataError(f"{where} has several weights: {', '.join(f'{weight:g}' for weight in weights)}", "invalid-row")
    if weights and weights[0] != 1:
        fields["weight"] = weights[0]
    return fields


def _weight(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or not (value == 0 or 1e-6 <= value <= 1e6):  # within float32
        raise DataError(
            f"{where}: expected true, false, 0 or a number from 1e-6 to 1e6, got {short(value)!r}", "invalid-row"
        )
    return float(value)


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and "type" in part


def _parts(parts: list, where: str) -> Message:
    """Return the fields that a list of parts has: content, reasoning_content and tool_calls.

    Other keys of a part become keys of the turn, to be counted as any that nothing reads.

    Raises:
        DataError: A part has another type, such as an image, or templates write the parts in another order.
    """
    fields: Message = {}
    order = list(dict.fromkeys(PART_FIELDS.values()))
    for i, part in enumerate(parts):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        part = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
        part_type = part.pop("type", "text")
        field = PART_FIELDS.get(part_type) if isinstance(part_type, str) else None
        value = part.pop(part_type if field and part_type in part else "value", None)
        if field is None or not (isinstance(value, str) or (value and field == "tool_calls")):
            raise DataError(
                f"{where}.content[{i}]: expected a part of type {', '.join(PART_FIELDS)}, got {short(parts[i])}",
                "invalid-row",
            )
        if any(order.index(other) > order.index(field) for other in fields if other in order):
            raise DataError(
                f"{where}.content[{i}]: expected reasoning, text and tool calls in this order, got {short(parts[i])}",
                "invalid-row",
            )
        value = parse_calls(value, f"{where}.content[{i}]") if field == "tool_calls" else value
        fields[field] = fields[field] + value if field in fields else value
        fields |= {f"content.{key}": each for key, each in part.items()}
    return fields


# ------------------------------------------------------------------------------------------------------------- tools


def _call_and_reasoning(value: Any) -> Message:
    """Return the fields of a turn that is a call as JSON, perhaps after <think>...</think>."""
    if isinstance(value, str) and THINK_END in value and isinstance(parse_json(value), str):
        reasoning, value = split_reasoning({"content": value})
        return {"reasoning_content": reasoning, "tool_calls": value}
    return {"tool_calls": value}


def parse_calls(value: Any, where: str) -> list[dict]:
    """Return tool calls in OpenAI's format: from a list of them or one, each nested or flat, or JSON of these."""
    value = parse_json(value)
    calls = value if isinstance(value, list) else [value]
    return [_call(parse_json(call), where) for call in calls]


def _call(call: Any, where: str) -> dict:
    function = parse_json(call.get("function", call)) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{where}: expected a tool call with a name, got {short(call)!r}", "invalid-row")
    arguments = parse_json(function.get("arguments", function.get("parameters")))
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        raise DataError(
            f"{where}: expected an object as arguments of {short(function['name'])}, got {short(arguments)!r}",
            "invalid-row",
        )
    named = {"id": str(call["id"])} if call.get("id") is not None else {}
    return named | {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def number_calls(messages: Messages) -> Messages:
    """Return messages in which calls without an id have one, and results without one have the id of their call."""
    numbered, open_ids, n = [], [], 0
    for message in messages:
        if calls := message.get("tool_calls"):
            # Nine letters and digits, which Mistral's templates expect.
            calls = [{"id": f"call{n + i:05}"} | call for i, call in enumerate(calls, 1)]
            n, open_ids = n + len(calls), [call["id"] for call in calls]
            message = message | {"tool_calls": calls}
        elif message["role"] == "tool" and open_ids:
            message = {"tool_call_id": open_ids[0]} | message
            open_ids = [each for each in open_ids if each != message["tool_call_id"]]
        numbered.append(message)
    return numbered


def count_open_calls(messages: Messages) -> int:
    """Return how many calls at the end of a conversation have no result yet."""
    n_results = next((i for i, message in enumerate(reversed(messages)) if message["role"] != "tool"), 0)
    last = messages[len(messages) - 1 - n_results] if messages else {}
    return max(0, len(last.get("tool_calls", ())) - n_results)


def parse_tools(value: Any, where: str) -> list[dict]:
    """Return descriptions of tools in OpenAI's format: from a list, each nested or flat, or JSON of these.

    Raises:
        DataError: The value is not a list of tools.
    """
    tools = parse_json(value)
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list):
        raise DataError(f"{where}: expected a list of tools, got {short(value)!r}", "invalid-row")
    return [_tool(parse_json(tool), f"{where}[{i}]") for i, tool in enumerate(tools)]


def _tool(tool: Any, where: str) -> dict:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: expected an object with the name of a function, got {short(tool)!r}", "invalid-row")
    return tool if "function" in tool else {"type": "function", "function": tool}


def parse_json(value: Any) -> Any:
    """Return what a string of JSON holds; a value that is no such string as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def leaves(value: Any) -> Iterable[Any]:
    """Yield the keys and the values in nested objects and lists."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield key
            if isinstance(each, str):  # almost always, so without another call
                yield each
            else:
                yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def parse_transcript(text: str) -> Messages:
    """Return the turns of a string as in Anthropic's HH data, each after an empty line and Human: or Assistant:."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    return [{"role": ROLES[who.lower()], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]
