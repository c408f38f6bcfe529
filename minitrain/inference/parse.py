"""Read reasoning and tool calls in generated responses.

A tokenizer with a response template (`response_template` in transformers) reads its own syntax. Otherwise <think> tags
are reasoning. <tool_call> tags with `{"name": ..., "arguments": ...}` are calls if the chat template writes calls so.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from minitrain.data.answers import find_answers
from minitrain.data.messages import THINK_END, Message, assistant, parse_calls, parse_message, parse_tools, user
from minitrain.data.template import Template
from minitrain.errors import DataError

THINK = "<think>"
_OPENED_THOUGHT = re.compile(rf"{THINK}\s*$")
_CALL_BEGIN, _CALL_END = re.compile(r"<tool_call>\s*"), re.compile(r"\s*</tool_call>")
_PROBE = {"name": "probe_name", "arguments": {"probe_key": ["probe_value", 1, None]}}
_PROBE_PARAMETERS = {"type": "object", "properties": {"probe_key": {"type": "array", "description": "d"}}}


@dataclass(frozen=True)
class Response:
    """A generated response.

    Attributes:
        text: The full response, without special tokens.
        message: The response as a message: its content, and `reasoning_content` and `tool_calls` if it has them.
        n_malformed: Number of tool calls that cannot be read. They stay in the content.
    """

    text: str
    message: Message
    n_malformed: int = 0

    @property
    def functions(self) -> list[dict]:
        """The name and the arguments of each call."""
        return [call["function"] for call in self.message.get("tool_calls", ())]


class ResponseParser:
    """Reads the responses to prompts of a chat template."""

    def __init__(self, template: Template):
        self.template, self.tokenizer = template, template.tokenizer
        self.has_response_template = getattr(self.tokenizer, "response_template", None) is not None
        decode = self.tokenizer.decode
        self._opens_thought = functools.lru_cache(64)(lambda last_ids: opens_thought(decode(list(last_ids))))

    @functools.cached_property
    def end_ids(self) -> list[int]:
        return self.template.end_ids()

    @functools.cached_property
    def reads_calls(self) -> bool:
        """Whether calls are read back as the chat template writes them."""
        if self.has_response_template:
            return True
        tools = parse_tools([{"name": _PROBE["name"], "description": "d", "parameters": _PROBE_PARAMETERS}], "tools")
        call = {"id": "call00001", "type": "function", "function": _PROBE}
        rendering, ends = self.template.renderer.bind({"tools": tools}), self.template.ends
        try:
            messages = [user("a"), assistant("") | {"tool_calls": [call]}]
            found = find_answers(rendering, messages, ends, self.template.has_markers)
        except (DataError, jinja2.TemplateError):
            return False
        answer = found.answers[-1]
        text = ends.end.sub("", found.text[answer.start : answer.stop])
        message, _ = parse_tags(text, opens_thought(found.text[: answer.start]), reads_calls=True)
        return [call["function"] for call in message.get("tool_calls", ())] == [_PROBE]

    @functools.cached_property
    def special_ids(self) -> set[int]:
        """The ids that `decode` can skip."""
        added = self.tokenizer.added_tokens_decoder
        return {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether a prompt ends inside of a thought."""
        return self._opens_thought(tuple(prompt_ids[-16:]))

    def parse(self, prompt_ids: Sequence[int], ids: Sequence[int], tools: list[dict] | None = None) -> Response:
        """Return a response.

        Args:
            prompt_ids: Token ids of the prompt.
            ids: Token ids of the response, with or without its end token.
            tools: The tools of the prompt, whose parameters give the arguments their types if the tokenizer has a
                response template.
        """
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if not self.has_response_template:
            # The tags are special tokens in some tokenizers.
            own = ids[:-1] if ids and ids[-1] in self.end_ids else ids
            is_text = self.special_ids.isdisjoint(own) and self.special_ids.issuperset(ids[len(own) :])
            marked = text if is_text else self.tokenizer.decode(own)
            message, n_malformed = parse_tags(marked, self.opens_thought(prompt_ids), self.reads_calls)
            return Response(text, assistant(text) if message == assistant(marked) else message, n_malformed)
        options: Mapping[str, Any] = {"tools": tools} if tools else {}
        try:
            turn = self.tokenizer.parse_response(list(ids), prefix=list(prompt_ids), **options)
            return Response(text, parse_message(turn | {"role": "assistant"}, "response"))
        except (ValueError, TypeError, LookupError, AttributeError, DataError):
            return Response(text, assistant(text), 1)


def opens_thought(prompt: str) -> bool:
    """Return whether a prompt ends inside of a thought."""
    return bool(_OPENED_THOUGHT.search(prompt))


def parse_tags(text: str, is_thought: bool, reads_calls: bool) -> tuple[Message, int]:
    """Return the message that a response is, and the number of its calls that cannot be read.

    Args:
        text: The response, with the tags.
        is_thought: Whether it begins inside of a thought.
        reads_calls: Whether to read calls.
    """
    reasoning, content = split_thought(THINK + text if is_thought else text)
    content, calls, n_malformed = split_calls(content) if reads_calls else (content, [], 0)
    message = assistant(content)
    message |= {"reasoning_content": reasoning} if reasoning else {}
    message |= {"tool_calls": calls} if calls else {}
    return message, n_malformed


def split_thought(text: str) -> tuple[str, str]:
    """Return (reasoning, the rest) of a text that begins with a thought. A thought without an end is the full text."""
    thought, _, rest = text.partition(THINK_END)
    if not thought.lstrip().startswith(THINK):
        return "", text
    return thought.lstrip().removeprefix(THINK).strip(), rest.lstrip("\n")


def split_calls(text: str) -> tuple[str, list[dict], int]:
    """Return (the text without its calls, the calls in OpenAI's format, the number of calls that cannot be read)."""
    parts, calls, n_malformed, position = [], [], 0, 0
    for begin in _CALL_BEGIN.finditer(text):
        if begin.start() < position:  # a tag in the arguments of a call
            continue
        try:
            value, stop = _DECODER.raw_decode(text, begin.end())
            call = parse_calls(value, "response")
        except (ValueError, RecursionError, DataError):
            call = []
        end = _CALL_END.match(text, stop) if len(call) == 1 else None
        if end is None:
            n_malformed += 1
            continue
        parts.append(text[position : begin.start()])
        calls, position = calls + call, end.end()
    content = "".join([*parts, text[position:]])
    return content.rstrip("\n") if calls else content, calls, n_malformed


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def response_columns(responses: Iterable[Response]) -> list[dict]:
    """Return the columns of each response in an output file: `response`, and what a response has besides its content.

    If one has reasoning or calls, all have `content`.
    """
    responses = list(responses)
    has_fields = any(len(response.message) > 2 for response in responses)
    return [
        {"response": response.text}
        | ({key: value for key, value in response.message.items() if key != "role"} if has_fields else {})
        for response in responses
    ]
