"""What a row has to be found in its text: no template may lose a field silently."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from minitrain.errors import DataError

from .answers import THOUGHT_OPENER, Answer, Answered
from .counts import LOST, PROMPT, TRAINED, UNTRAINED, UNUSED
from .messages import THINK_END, Message, Messages, leaves, split_reasoning

MIN_REPEATED = 12  # characters; shorter reasoning may occur in an answer by chance
MAX_OPENER = 40  # characters at the end of a prompt that opens a thought
_ESCAPED = re.compile(r"[\"'\\]")
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")


class Needles(NamedTuple):
    """How fields of rows are checked.

    Attributes:
        on_missing: The option of the config: error or warn.
        train_on_reasoning: That of the config. Reasoning that is not trained on may be left out of the history.
        knows_enable_thinking: Whether the chat template reads this variable.
    """

    on_missing: str
    train_on_reasoning: bool
    knows_enable_thinking: bool

    def check(
        self, messages: Messages, trained: Collection[int], variables: Mapping[str, Any], found: Answered
    ) -> Counter:
        """Count what messages and tools have and the text does not.

        Args:
            trained: The turns that are trained on.
            found: The text, and where the answers are in it.

        Raises:
            DataError: Something is missing, and `on_missing` is error.
        """
        counts: Counter = Counter()
        answers = {answer.turn: answer for answer in found.answers}
        parts = {i: found.text[answer.start : answer.stop] for i, answer in answers.items()}
        for i in trained:
            where, is_last = f"turn {i + 1} of {len(messages)}", i == len(messages) - 1
            for lost in lost_fields(messages[i], parts.get(i, "")):
                if lost.field == "reasoning" and not self.train_on_reasoning:
                    counts[LOST + lost.field] += 1
                else:
                    self._report_lost(where, lost, not is_last, counts)
            if i in answers:
                self._check_prompt(messages[i], found.text, answers[i], where, is_last, counts)
        context = {i: message for i, message in enumerate(messages) if i not in trained}
        for lost in lost_context(context, variables.get("tools") or [], found.text, parts):
            self._report_lost("the prompt", lost, False, counts)
        return counts

    def _report_lost(self, where: str, lost: "Lost", is_earlier: bool, counts: Counter) -> None:
        if self.on_missing == "warn":
            counts[LOST + lost.field] += 1
            return
        fix = "Set train_on=each_turn to train on each response as it is given, or last_turn for the last one only"
        if not is_earlier:
            fix = "Use a chat_template that writes it, or remove it from the row"
        raise DataError(
            f"{where}: the chat template leaves out or changes: {lost}. {fix}; on_missing=warn trains on the rest",
            "lost-field",
        )

    def _check_prompt(
        self, message: Message, text: str, answer: Answer, where: str, is_last: bool, counts: Counter
    ) -> None:
        """Count a response that does not continue the prompt of inference, or that has an empty thought.

        Raises:
            DataError: The prompt opens another response than this one, and `on_missing` is error.
        """
        has_thought = THINK_END in message["content"] or bool(split_reasoning(message)[0])
        opened = not has_thought and THOUGHT_OPENER.search(text[max(0, answer.start - MAX_OPENER) : answer.start])
        if (opened or (answer.after_other_prompt and is_last)) and self.on_missing == "error":
            problem = "begins the response in another way than the chat template writes this response"
            fix = "Use a chat_template that fits it, or remove the row"
            if opened:
                problem = "opens a thought, and the response has no reasoning"
            if self.knows_enable_thinking:
                fix = f"Set chat_template_kwargs={{enable_thinking: {str(has_thought).lower()}}}"
            raise DataError(
                f"{where}: the prompt at inference {problem}. {fix}; on_missing=warn trains on it as it is",
                "other-prompt",
            )
        if opened or (not has_thought and _EMPTY_THOUGHT.search(text, answer.start, answer.stop)):
            counts["empty-thoughts"] += 1
        if answer.after_other_prompt:
            counts["other-prompts"] += 1


class Lost(NamedTuple):
    """A field that a text does not have, with what it belongs to."""

    field: str
    owner: str = ""

    def __str__(self) -> str:
        return f"{self.field} {self.owner}".rstrip()


def lost_fields(message: Message, text: str) -> list[Lost]:
    """Return the fields of an answer that a text does not have, or has twice.

    Args:
        text: What is trained on, as it was rendered.
    """
    reasoning, content = split_reasoning(message)
    if not reasoning and "tool_calls" not in message:  # almost always
        return [] if _has(text, content) else [Lost("content")]
    fields = [[(Lost("content"), content)], [(Lost("reasoning"), reasoning)], *_fields_of_calls(message)]
    lost = _lost(fields, text)
    if len(reasoning) >= MIN_REPEATED:
        elsewhere = content + json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
        if text.count(reasoning) > 1 + elsewhere.count(reasoning):
            lost.append(Lost("reasoning", "(which it has twice)"))
    return lost


def lost_context(
    messages: Mapping[int, Message], tools: list[dict], text: str, answers: Mapping[int, str] | None = None
) -> list[Lost]:
    """Return what the model is to read and the full text does not have: contents and calls of turns, and tools.

    Templates leave out the reasoning of earlier turns on purpose.

    Args:
        messages: Turn -> message.
        answers: Turn -> its part of the text, where it is known.
    """
    lost = []
    for i, message in messages.items():
        is_answer = message["role"] == "assistant"
        content = split_reasoning(message)[1] if is_answer else message["content"].strip()
        if not _has(text, content):
            lost.append(Lost("content", f"of the {message['role']} turn"))
        if "tool_calls" in message:
            lost += _lost(_fields_of_calls(message), (answers or {}).get(i, text))
    return lost + [Lost("tool", tool["function"]["name"]) for tool in tools if not _has_tool(text, tool["function"])]


Field = list[tuple[Lost, Any]]  # values that the text must have, with what is lost without each


def _fields_of_calls(message: Message) -> list[Field]:
    fields = []
    for function in (call["function"] for call in message.get("tool_calls", ())):
        call, arguments = (Lost(field, f"of {function['name']}") for field in ("call", "arguments"))
        fields.append([(call, function["name"]), *((arguments, leaf) for leaf in leaves(function["arguments"]))])
    return fields


def _lost(fields: list[Field], text: str) -> list[Lost]:
    """Return the first part of each field that a text does not have.

    The text must have a value as often as the fields have it: each is taken out of the text, the longest first, so that
    a short one is not found in another one.
    """
    values = [
        (len(str(value)), i, j, value)
        for i, field in enumerate(fields)
        for j, (_, value) in enumerate(field)
        if value != ""
    ]
    if len(values) == 1 and _has(text, values[0][-1]):
        return []
    missing: dict[int, int] = {}
    for _, i, j, value in sorted(values, key=lambda each: -each[0]):
        form = next((form for form in _forms(value) if form in text), None)
        if form is None:
            missing[i] = min(j, missing.get(i, j))
        else:
            text = text.replace(form, "\0", 1)
    return [fields[i][missing[i]][0] for i in sorted(missing)]


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
    fields = _fields_of_calls(message)
    for i in range(len(fields)):
        uses = ((trained, TRAINED), (text, PROMPT))
        use = next((use for part, use in uses if not _lost(fields[i : i + 1], part)), UNUSED)
        yield f"call {i}", f"calls:{use}"
    if "weight" in message:
        yield "weight", f"weights:{UNTRAINED if not message['weight'] else TRAINED if trained else UNUSED}"


def uses_of_variables(variables: Mapping[str, Any], text: str) -> Iterator[tuple[str, str]]:
    """Yield (field, FIELD:USE) of each tool and document."""
    for i, tool in enumerate(variables.get("tools") or ()):
        yield f"tool {i}", f"tools:{PROMPT if _has_tool(text, tool['function']) else UNUSED}"
    documents = variables.get("documents") or []
    for i, document in enumerate(documents if isinstance(documents, list) else [documents]):
        values = [*document.values()] if isinstance(document, dict) else document
        longest = max((leaf for leaf in leaves(values) if isinstance(leaf, str)), key=len, default="")
        yield f"document {i}", f"documents:{PROMPT if longest and _has(text, longest.strip()) else UNUSED}"


def _has_tool(text: str, function: dict) -> bool:
    """Return whether a text has the name and the description of a tool; its name alone may be that of a call."""
    description = function.get("description")
    lines = description.splitlines() if isinstance(description, str) else []  # some write each line as a comment
    return all(_has(text, value.strip()) for value in (function["name"], *lines))


def _has(text: str, value: Any) -> bool:
    return (isinstance(value, str) and value in text) or any(form in text for form in _forms(value))


def _forms(value: Any) -> Iterator[str]:
    """Yield the ways in which templates write a value: as in JSON, in Python, or as it is."""
    if not isinstance(value, str):
        yield from (json.dumps(value), str(value))
    elif value.isascii() and value.isprintable() and not _ESCAPED.search(value):
        yield value
    else:  # escaped first: the value itself may be a part of another one
        quoted = json.dumps(value, ensure_ascii=False), json.dumps(value), repr(value)
        yield from (*(form[1:-1] for form in quoted), value)
