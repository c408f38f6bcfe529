"""What a row has to be found in its text: no template may lose a field silently."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from minitrain.errors import DataError

from .answers import THOUGHT_OPENER, Answer
from .counts import LOST, PROMPT, TRAINED, UNTRAINED, UNUSED
from .messages import THINK_END, Message, Messages, leaves, split_reasoning

MIN_REPEATED = 12  # characters; shorter reasoning may occur in an answer by chance
MAX_OPENER = 40  # characters at the end of a prompt that opens a thought
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")


class Needles(NamedTuple):
    """How fields of rows are checked.

    Attributes:
        on_missing: The option of the config: error or warn.
        knows_enable_thinking: Whether the chat template reads this variable.
    """

    on_missing: str
    knows_enable_thinking: bool

    def check(
        self, messages: Messages, answers: Mapping[int, Answer | None], variables: Mapping[str, Any], text: str
    ) -> Counter:
        """Count what messages and tools have and the text does not.

        Args:
            answers: Turn that is trained on -> where it is in the text.

        Raises:
            DataError: Something is missing, and `on_missing` is error.
        """
        counts: Counter = Counter()
        for i, answer in answers.items():
            where, is_last = f"turn {i + 1} of {len(messages)}", i == len(messages) - 1
            for lost in lost_fields(messages[i], text[answer.start : answer.stop] if answer else ""):
                self._report_lost(where, lost, not is_last, counts)
            if answer:
                counts += self._check_prompt(messages[i], text, answer, where, is_last)
        context = [message for i, message in enumerate(messages) if i not in answers]
        for lost in lost_context(context, variables.get("tools") or [], text):
            self._report_lost("the prompt", lost, False, counts)
        return counts

    def _report_lost(self, where: str, lost: "Lost", is_earlier: bool, counts: Counter) -> None:
        if self.on_missing == "warn":
            counts[LOST + lost.field] += 1
            return
        fix = "train_on=each_turn trains on each answer as it is given, last_turn on the last one only"
        if not is_earlier:
            fix = "Use a chat_template that writes it, or remove it from the row"
        raise DataError(
            f"{where}: the chat template leaves out or changes: {lost}. {fix}; on_missing=warn trains on the rest",
            "lost-field",
        )

    def _check_prompt(self, message: Message, text: str, answer: Answer, where: str, is_last: bool) -> Counter:
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
        is_empty = opened or (not has_thought and _EMPTY_THOUGHT.search(text, answer.start, answer.stop))
        return Counter({"empty-thoughts": bool(is_empty), "other-prompts": answer.after_other_prompt})


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
    lost = [] if _has(text, content) else [Lost("content")]
    if not _has(text, reasoning):
        lost.append(Lost("reasoning"))
    elif len(reasoning) >= MIN_REPEATED:
        elsewhere = content + json.dumps(message.get("tool_calls", ""), ensure_ascii=False)
        if text.count(reasoning) > 1 + elsewhere.count(reasoning):
            lost.append(Lost("reasoning", "(which it has twice)"))
    return lost + _lost_calls(message, text)


def lost_context(messages: Messages, tools: list[dict], text: str) -> list[Lost]:
    """Return what the model is to read and the full text does not have: contents and calls of turns, and tools.

    Templates leave out the reasoning of earlier turns on purpose.
    """
    lost = []
    for message in messages:
        is_answer = message["role"] == "assistant"
        content = split_reasoning(message)[1] if is_answer else message["content"].strip()
        if not _has(text, content):
            lost.append(Lost("content", f"of the {message['role']} turn"))
        lost += _lost_calls(message, text)
    return lost + [Lost("tool", tool["function"]["name"]) for tool in tools if not _has_tool(text, tool["function"])]


def _lost_calls(message: Message, text: str) -> list[Lost]:
    return [lost for call in message.get("tool_calls", ()) for lost in _lost_of_call(call["function"], text)]


def _lost_of_call(function: dict, text: str) -> Iterator[Lost]:
    if not _has(text, function["name"]):
        yield Lost("call", f"of {function['name']}")
    elif not all(_has(text, leaf) for leaf in leaves(function["arguments"])):
        yield Lost("arguments", f"of {function['name']}")


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
        use = next((use for part, use in uses if not any(_lost_of_call(call["function"], part))), UNUSED)
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
    """Return whether a text has a value, as it is or in the ways in which templates write JSON and XML."""
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    return value in text or any(_json(value, ascii_only) in text for ascii_only in (False, True))


def _json(value: str, ascii_only: bool) -> str:
    return json.dumps(value, ensure_ascii=ascii_only)[1:-1]
