"""Find the fields of a row in the text of its documents: reasoning, tool calls and results.

The token cache has ids and a mask only. So the row is read again and encoded with marks around its fields, in the same
way as for training. Where the text without the marks is not that of the document, no field is found.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from minitrain.config.sections import DatasetConfig
from minitrain.data.encode import TruncationConfig, encode
from minitrain.data.examples import Conversation, Example, Rollout, to_example
from minitrain.data.loader import TokenizedDataset
from minitrain.data.messages import Message, split_reasoning
from minitrain.data.source import open_source
from minitrain.data.template import Template
from minitrain.errors import DataError

REASONING, CALL, RESULT, ANSWER = "reasoning", "call", "result", "answer"
# Characters of private use: the beginning of each field, and the end of one.
_BEGIN = dict(zip((REASONING, CALL, RESULT, ANSWER), "\ue0f3\ue0f4\ue0f5\ue0f6", strict=True))
_END = "\ue0f7"
_MARK = re.compile(f"[{''.join(_BEGIN.values())}{_END}]")
_NO_LIMIT = TruncationConfig(max_length=1 << 40)


class Span(NamedTuple):
    start: int
    stop: int
    kind: str


@dataclass
class RowFields:
    """What is known of a row again.

    Attributes:
        texts: The text of each document and the fields in it.
        turns: For each document of `train_on: each_turn`, the turns that it trains on, in words.
        unread: Keys that nothing reads.
    """

    texts: list[tuple[str, list[Span]]] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def read_fields(
    examples: TokenizedDataset, selected: Iterable[int], entries: list[DatasetConfig], kind: str, template: Template
) -> dict[int, RowFields]:
    """Return the fields of the selected examples. The files are read again up to the last of their lines."""
    by_source: dict[str, dict[int, int]] = {}
    for index in selected:
        cache, number = examples.locate(index)
        by_source.setdefault(cache.source, {})[int(cache.lines[number])] = index
    fields = {}
    for entry in entries:
        source = open_source(entry)
        lines = by_source.pop(source.name, {})
        for line, row in source.rows() if lines else ():
            if line in lines and isinstance(row, dict):
                fields[lines.pop(line)] = _fields_of(to_example(row, entry, kind), template)
            if not lines:
                break
    return fields


def _fields_of(example: Example, template: Template) -> RowFields:
    lists = {
        name: value for name, value in vars(example).items() if name in ("messages", "prompt", "chosen", "rejected")
    }
    lists |= {"response": value} if isinstance(value := getattr(example, "response", None), list) else {}
    lists = {name: messages for name, messages in lists.items() if all(isinstance(m, dict) for m in messages)}
    messages = [message for each in lists.values() for message in each]
    keys = [key for message in messages for key in template.renderer.unread_keys(message)]
    fields = RowFields(unread=[*example.unread, *template.unread_variables(example), *dict.fromkeys(keys)])
    marked = dataclasses.replace(example, **{name: list(map(_mark_message, each)) for name, each in lists.items()})
    if isinstance(marked, Rollout):
        marked.tokens = {}
    try:
        documents = encode(marked, template, _NO_LIMIT)
    except DataError:  # of the marks, since the row itself was encoded
        return fields
    for document in documents if isinstance(documents, list) else ():
        text = template.tokenizer.decode(document.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        fields.texts.append(_without_marks(text, template))
        if isinstance(example, Conversation) and template.targets.train_on == "each_turn":
            turns = " and ".join(str(turn + 1) for turn in document.turns)
            fields.turns.append(f"turn{'s' * (len(document.turns) > 1)} {turns} of {len(messages)}")
    return fields


# ------------------------------------------------------------------------------------------------------------- marks


def _mark_message(message: Message) -> Message:
    if message["role"] == "tool":
        return message | {"content": _mark(message["content"], RESULT)}
    if message["role"] != "assistant":
        return message
    marked, content, (reasoning, answer) = dict(message), message["content"], split_reasoning(message)
    start = content.rfind(answer) if answer else len(content)
    before = content[:start]
    if "reasoning_content" in message:
        marked["reasoning_content"] = _mark(message["reasoning_content"], REASONING)
    elif reasoning:
        before = before.replace(reasoning, _mark(reasoning, REASONING), 1)
    marked["content"] = before + _mark(content[start:], ANSWER)
    if "tool_calls" in message:
        marked["tool_calls"] = [_mark_call(call) for call in message["tool_calls"]]
    return marked


def _mark(text: str, kind: str) -> str:
    """Return a text with marks around it, inside of white space, which templates strip."""
    core = text.strip()
    start = text.find(core)
    return text[:start] + _BEGIN[kind] + core + _END + text[start + len(core) :] if core else text


def _mark_call(call: dict) -> dict:
    """Return a call with a mark before its name, and one after its name and each string in its arguments."""
    function = call["function"]
    marked = {"name": _BEGIN[CALL] + function["name"] + _END, "arguments": _mark_ends(function["arguments"])}
    return call | {"function": function | marked}


def _mark_ends(value):
    if isinstance(value, dict):
        return {key: _mark_ends(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_mark_ends(each) for each in value]
    return value + _END if isinstance(value, str) else value


def _without_marks(marked: str, template: Template) -> tuple[str, list[Span]]:
    """Return a text without marks, and its fields: each from its beginning to the last end before the next one."""
    text, spans, position = "", [], 0
    for match in _MARK.finditer(marked):
        text += marked[position : match.start()]
        position = match.end()
        if match[0] != _END:
            kind = next(kind for kind, begin in _BEGIN.items() if begin == match[0])
            spans.append(Span(len(text), len(text), kind))
        elif spans:
            spans[-1] = spans[-1]._replace(stop=len(text))
    text += marked[position:]
    special = [match.span() for match in template.ends.start.finditer(text)]
    return text, [_widen(i, spans, text, special) if span.kind == CALL else span for i, span in enumerate(spans)]


def _widen(i: int, spans: list[Span], text: str, special: list[tuple[int, int]]) -> Span:
    """Return the span of a call with the syntax around it: up to line ends, special tokens and the next fields."""
    start, stop, kind = spans[i]
    before = [end for _, end in special if end <= start] + [span.stop for span in spans[:i]]
    after = [begin for begin, _ in special if begin >= stop] + [span.start for span in spans[i + 1 :]]
    line_end = text.find("\n", stop)
    after.append(line_end if line_end >= 0 else len(text))
    return Span(max([text.rfind("\n", 0, start) + 1, *before]), min(after), kind)


def find_document(known: RowFields, document: str, bos_token: str | None) -> tuple[list[Span], str]:
    """Return the fields in a document, and the turns that it trains on, in words; nothing if it is not known.

    The document is a part of one of the texts, apart from white space, and without the beginning and the end that
    truncation removed.

    Args:
        bos_token: What a document may begin with after its prompt was truncated.
    """
    own = _solid(document)
    letters = "".join(document[i] for i in own)
    for n_bos in (0, len(bos_token)) if bos_token and letters.startswith(bos_token) else (0,):
        for i in sorted(range(len(known.texts)), key=lambda i: len(known.texts[i][0])):
            text, spans = known.texts[i]
            solid = _solid(text)
            shift = "".join(text[k] for k in solid).rfind(letters[n_bos:])
            if shift >= 0 and n_bos < len(own):
                places = [
                    Span(*np.searchsorted(solid, span[:2]) - shift + n_bos, span.kind) for span in spans
                ]  # in `own`
                places = [Span(max(start, n_bos), min(stop, len(own)), kind) for start, stop, kind in places]
                found = [Span(int(own[a]), int(own[b - 1]) + 1, kind) for a, b, kind in places if a < b]
                return found, known.turns[i] if known.turns else ""
    return [], ""


def _solid(text: str) -> np.ndarray:
    """Return the positions of the characters that are not white space."""
    return np.array([i for i, character in enumerate(text) if not character.isspace()], np.int64)
