"""Messages -> text by a chat template, in the form that this template reads.

Templates differ in the name of the reasoning, in whether the arguments of a call are an object or JSON, in the content
of a message that only calls, and in the ids of calls. A probe is rendered in each form; the first form whose text has
every field is used.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jinja2

from minitrain.config.suggest import suggest
from minitrain.errors import ConfigError

from .messages import REASONING_KEYS, Message, Messages, parse_tools, user
from .sandbox import Span, render, render_marked

RESERVED = ("messages", "tools", "documents", "add_generation_prompt")  # what every template is given
_ABSENT = object()
_SHORT_ID = re.compile("[a-zA-Z0-9]{9}")
_PROBE_CALL = {"name": "probe_name", "arguments": {"probe_key": "probe_value"}}


def set_defaults(source: str, variables: Mapping[str, Any]) -> str:
    """Return a chat template with default values of its variables, which it has wherever it is used.

    Raises:
        ConfigError: The template does not read a variable, or the variable or its value cannot have a default.
    """
    check_variables(source, variables)
    lines = "".join(f"{{% set {name} = {name} | default({value!r}) %}}\n" for name, value in variables.items())
    return source if lines in source else lines + source


def check_variables(source: str, variables: Mapping[str, Any]) -> None:
    """Raise ConfigError for arguments of a chat template that it does not read, or that are not plain values."""
    words = set(re.findall(r"\w+", source))
    for name, value in variables.items():
        where = f"chat_template_kwargs.{name}"
        if name in RESERVED:
            raise ConfigError(f"{where}: is not an argument of a template. Remove it.", "unknown-option")
        if name not in words:
            advice = suggest(name, words) or " Remove it."
            raise ConfigError(f"{where}: has no effect, the chat template does not read it.{advice}", "no-effect")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{where}: expected a value as in JSON, got {value!r}. Write one.", "wrong-type"
            ) from None


class CallForm(NamedTuple):
    """How a template reads a message with tool calls: the content if there is none, and the arguments."""

    empty_content: Any = ""
    arguments_as_json: bool = False


class Rendering(NamedTuple):
    """A conversation's way to text: its messages, with what else the template is given."""

    text: Callable[[Messages], str]
    prompt: Callable[[Messages], str]  # opened for an answer
    marked: Callable[[Messages], tuple[str, list[Span]]]  # with the spans in {% generation %}
    header: Callable[[], str]  # what opens a response at inference


class ChatRenderer:
    """A chat template and its variables."""

    def __init__(self, source: str, variables: Mapping[str, Any]):
        """
        Args:
            variables: What every conversation is rendered with, such as the special tokens.
        """
        self.source, self.variables = source, dict(variables)
        self.words = frozenset(re.findall(r"\w+", source))
        self._known_keys = {"role", "content", "tool_calls", "tool_call_id", "reasoning_content"} | self.words
        self._headers: dict[str, str] = {}

    def bind(self, variables: Mapping[str, Any]) -> Rendering:
        """Return the rendering of conversations with more variables, such as `tools`.

        It keeps the last text of each length, because the beginnings of a long conversation are needed again and again.
        """
        added = {key: value for key, value in variables.items() if key not in ("tools", "documents")}
        variables = self.variables | variables
        kept: dict[tuple[int, bool], tuple[Messages, str]] = {}

        def text(messages: Messages, prompt: bool = False) -> str:
            same, rendered = kept.get((len(messages), prompt), (None, ""))
            if same is None or any(a is not b for a, b in zip(same, messages)):
                rendered = render(self.source, self.adapt(messages), add_generation_prompt=prompt, **variables)
                kept[len(messages), prompt] = messages, rendered
            return rendered

        def marked(messages: Messages) -> tuple[str, list[Span]]:
            return render_marked(self.source, self.adapt(messages), add_generation_prompt=False, **variables)

        return Rendering(text, functools.partial(text, prompt=True), marked, functools.partial(self._header, added))

    def adapt(self, messages: Messages) -> Messages:
        """Return messages in the form that the template reads."""
        adapted = [self._adapt(message) for message in messages]
        return [_with_parts(message) for message in adapted] if self.reads_parts else adapted

    def _adapt(self, message: Message) -> Message:
        adapted = {key: value for key, value in message.items() if key not in ("weight", "reasoning_content")}
        if message["role"] == "developer" and "developer" not in self.words:
            adapted["role"] = "system"
        if "reasoning_content" in message and self.reasoning_key:
            adapted[self.reasoning_key] = message["reasoning_content"]
        if "tool_calls" in message:
            adapted["tool_calls"] = [self._adapt_call(call, self.call_form) for call in message["tool_calls"]]
            if not message["content"]:
                adapted = _with_content(adapted, self.call_form.empty_content)
        if "tool_call_id" in message:
            adapted["tool_call_id"] = self._adapt_id(message["tool_call_id"])
        return adapted

    def _adapt_call(self, call: dict, form: CallForm) -> dict:
        function = call["function"]
        if form.arguments_as_json:
            function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        return call | {"id": self._adapt_id(call["id"]), "function": function}

    def _adapt_id(self, call_id: str) -> str:
        if _SHORT_ID.fullmatch(call_id) or not self.needs_short_ids:
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]

    def check(self, variables: Mapping[str, Any]) -> None:
        """Raise ConfigError for arguments that the template does not read, or that are not plain values."""
        check_variables(self.source, variables)

    def unread_variables(self, variables: Mapping[str, Any]) -> list[str]:
        """Return what the template does not read of a row. Tools and documents have counts of their own."""
        unread = [name for name in variables if name not in self.words and name not in ("tools", "documents")]
        return [f"chat_template_kwargs.{name}" for name in unread]

    def unread_keys(self, message: Message) -> list[str]:
        """Return the keys of a message that neither the template nor minitrain reads."""
        is_answer = message["role"] == "assistant"
        return [key for key in message if key not in self._known_keys and not (is_answer and key == "weight")]

    # ------------------------------------------------------------------------------------------ what a template reads

    def _header(self, variables: Mapping[str, Any]) -> str:
        """Return what `add_generation_prompt` adds to a conversation; nothing if that is not added at its end.

        Args:
            variables: What is given besides `self.variables`.
        """
        key = json.dumps(variables, sort_keys=True, default=str)
        if key not in self._headers:
            messages = self.adapt([user("a")])
            try:
                text, prompt = (
                    render(self.source, messages, add_generation_prompt=prompt, **self.variables | variables)
                    for prompt in (False, True)
                )
            except jinja2.TemplateError:
                text, prompt = "", ""
            self._headers[key] = prompt.removeprefix(text) if prompt.startswith(text) else ""
        return self._headers[key]

    @functools.cached_property
    def reads_parts(self) -> bool:
        """Whether the template reads contents as lists of parts only, like those of models for images."""
        content = "probe_content"
        return content not in self._probe({"content": content}) and content in self._probe(
            {"content": content}, as_parts=True
        )

    @functools.cached_property
    def reasoning_key(self) -> str | None:
        """The name by which the template reads reasoning; None if it reads none."""
        names = [name for name in REASONING_KEYS if name in self.words]
        for name in names:
            if "probe_reasoning" in self._probe({"content": "b", name: "probe_reasoning"}):
                return name
        return names[0] if names else None

    @functools.cached_property
    def call_form(self) -> CallForm:
        """The form of tool calls in which the template writes all of a call."""
        for as_json, content in itertools.product((False, True), ("", None, _ABSENT)):
            form = CallForm(content, as_json)
            call = {"id": "call00001", "type": "function", "function": _PROBE_CALL}
            if as_json:
                call["function"] = _PROBE_CALL | {"arguments": json.dumps(_PROBE_CALL["arguments"])}
            text = self._probe(_with_content({"tool_calls": [call]}, content))
            # Single quotes are Python's way to write an object, and backslashes are JSON in JSON.
            if all(word in text for word in ("probe_name", "probe_key", "probe_value")) and not re.search(
                r"'probe_key'|\\\"probe_key|None", text
            ):
                return form
        return CallForm()

    @functools.cached_property
    def needs_short_ids(self) -> bool:
        """Whether the template refuses ids of calls as OpenAI makes them, like Mistral's, which take 9 characters."""
        if "tool_call_id" not in self.words and "id" not in self.words:
            return False

        def answer(call_id: str) -> str:
            call = {"id": call_id, "type": "function", "function": _PROBE_CALL}
            return self._probe(_with_content({"tool_calls": [call]}, self.call_form.empty_content))

        return not answer("call_0123456789abcdef") and bool(answer("call00001"))

    def text_of_calls(self) -> str:
        """Return a response with tool calls as the template writes it; empty if it writes none."""
        call = {"id": "call00001", "type": "function", "function": _PROBE_CALL}
        for calls in ([call, call], [call]):  # several, because some end only the second one, and others refuse it
            message = self._adapt({"role": "assistant", "content": "", "tool_calls": calls})
            if "probe_name" in (text := self._probe(message)):
                return text
        return ""

    def _probe(self, answer: Message, as_parts: bool = False) -> str:
        """Return the text of a conversation with one answer, empty if the template refuses it."""
        tools = parse_tools([{"name": "probe_name", "description": "d", "parameters": _PROBE_PARAMETERS}], "tools")
        try:
            variables = self.variables | {"tools": tools}
            messages = [user("a"), {"role": "assistant"} | answer]
            messages = [_with_parts(message) for message in messages] if as_parts else messages
            text = render(self.source, messages, add_generation_prompt=False, **variables)
            before = render(self.source, messages[:1], add_generation_prompt=False, **variables)
        except jinja2.TemplateError:
            return ""
        return text[len(before) :] if text.startswith(before) else text


_PROBE_PARAMETERS = {"type": "object", "properties": {"probe_key": {"type": "string", "description": "d"}}}


def _with_content(message: Message, content: Any) -> Message:
    message = {key: value for key, value in message.items() if key != "content"}
    return message if content is _ABSENT else message | {"content": content}


def _with_parts(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
