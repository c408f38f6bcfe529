"""Where the answers are in a rendered conversation.

The text before an answer is what the template gives at inference (`add_generation_prompt`), so that an answer begins
where the model begins to write.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from minitrain.errors import DataError

from .messages import Message, Messages, split_reasoning
from .rendering import Rendering

# Characters of private use, which no text of a data set should have: the borders of a content, and special tokens that
# are ordinary text.
OPEN, CLOSE, LITERAL = "\ue0f0", "\ue0f1", "\ue0f2"
_THOUGHT_OPENER = re.compile(r"<(think|thinking|reasoning)>\s*$")
_HIDDEN = "the chat template hides the answer; give chat_template=chatml or a template of your own"


@dataclass
class Ends:
    """The tokens that may end a turn, as regular expressions."""

    any_special: str
    eos_token: str

    def __post_init__(self):
        self.start = re.compile(self.any_special)
        self.end = re.compile(f"(?:{self.any_special})(?=\\s*$)")

    def close(self, tail: str) -> str:
        """Return an answer that ends in its end token: what follows is cut, and EOS is added if there is none."""
        end = self.end.search(tail)
        return tail[: end.end()] if end else tail.rstrip("\n") + self.eos_token


@dataclass(frozen=True)
class Answer:
    """The span of one answer in a text, and which message it is."""

    start: int
    stop: int
    turn: int


@dataclass
class Answered:
    """A conversation as text, with its answers in order."""

    text: str
    answers: list[Answer]
    counts: Counter = field(default_factory=Counter)


def find_answers(rendering: Rendering, messages: Messages, ends: Ends, has_markers: bool) -> Answered:
    """Render a conversation that ends with an answer, and find all answers in it.

    Args:
        has_markers: Whether the template marks answers with {% generation %}.

    Raises:
        DataError: The last answer is not in the text.
        jinja2.TemplateError: The template refuses the conversation.
    """
    if has_markers and (marked := _marked(rendering, messages, ends)):
        return marked
    prompt, tail, counts = _split_answer(rendering, messages, ends)
    found = find_earlier(rendering, messages[:-1], prompt, ends)
    found.answers.append(Answer(len(prompt), len(prompt) + len(tail), len(messages) - 1))
    return Answered(prompt + tail, found.answers, found.counts + counts)


def find_earlier(rendering: Rendering, messages: Messages, prompt: str, ends: Ends) -> Answered:
    """Find the answers in a prompt that was rendered from `messages`; those that it has in other words are left out."""
    answers = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            # Before a first turn there is nothing to render, so its header would count as part of the answer.
            span = _span_by_prefix(rendering, messages, i, prompt, ends) if i else None
            by_mark = _span_of_calls if message.get("tool_calls") else _span_by_mark
            span = span or by_mark(rendering, messages, i, prompt, ends)
            answers += [Answer(*span, i)] if span else []
    return Answered(prompt, answers)


def _marked(rendering: Rendering, messages: Messages, ends: Ends) -> Answered | None:
    """Find the spans inside {% generation %}, each with the token that ends its turn.

    Returns None if the template does not mark one span for each answer.
    """
    text, spans = rendering.marked(messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(turns) != len(spans):
        return None
    closed = []
    for start, stop in spans:
        n = len(rendering.header)  # which inference writes, also if the template marks its end
        header = text.find(rendering.header, max(0, start - n), start + n) if n else -1
        start = header + n if header >= 0 else start
        token = ends.end.search(text, start, stop) or ends.start.match(text, stop)
        closed.append((start, token.end() if token else stop))
    text = text[: closed[-1][1]]
    if not ends.end.search(text):
        text += ends.eos_token
        closed[-1] = (closed[-1][0], len(text))
    return Answered(text, [Answer(*span, turn) for span, turn in zip(closed, turns, strict=True)])


def _split_answer(rendering: Rendering, messages: Messages, ends: Ends) -> tuple[str, str, Counter]:
    """Return (the text before the last answer at inference, the answer with the token that ends it, counts)."""
    if len(messages) == 1:
        return (*_split_at_mark(rendering, messages, ends), Counter())
    full, prompt = rendering.text(messages), rendering.prompt(messages[:-1])
    if full.startswith(prompt):
        if full == prompt:
            raise DataError(_HIDDEN, "invalid-template")
        return prompt, ends.close(full[len(prompt) :]), Counter()
    opener = _THOUGHT_OPENER.search(prompt)
    if opener and full.startswith(prompt[: opener.start()]):
        return (prompt, *_continue_thought(messages[-1], opener, full[opener.start() :], ends))
    history = rendering.text(messages[:-1])
    common = _common_prefix(full, prompt)
    if common > len(history) and full.startswith(history):
        # The prompt opens the answer in another way than this one, e.g. an empty thought before a thought.
        return full[:common], ends.close(full[common:]), Counter({"other-prompts": 1})
    # The template writes the history in other words once it is answered: keep the prompt of inference.
    if prompt.startswith(history) and (header := prompt[len(history) :]):
        before, answer = _split_at_mark(rendering, messages, ends)
        begin = before.rfind(header)
        return prompt, (before + answer)[begin + len(header) :] if begin >= 0 else answer, Counter()
    return prompt, _split_at_mark(rendering, messages, ends)[1], Counter()


def _continue_thought(answer: Message, opener: re.Match, tail: str, ends: Ends) -> tuple[str, Counter]:
    """Return an answer behind a prompt that opens a thought which the template itself does not write, as DeepSeek-R1's.

    Args:
        tail: What the template writes of the answer, without its reasoning.
    """
    reasoning, _ = split_reasoning(answer)
    closing = f"\n</{opener[1]}>\n\n"
    counts = Counter() if reasoning else Counter({"empty-thoughts": 1})
    return reasoning + closing + ends.close(tail), counts


def _split_at_mark(rendering: Rendering, messages: Messages, ends: Ends) -> tuple[str, str]:
    """Return the text before and after the beginning of the first field that is written of the last answer."""
    *earlier, last = messages
    starts = []
    for marked in _with_marks(last):
        before, mark, tail = rendering.text([*earlier, marked]).rpartition(OPEN)
        if mark:
            starts.append((len(before), before, ends.close(tail)))
    if not starts:
        raise DataError(_HIDDEN, "invalid-template")
    return min(starts)[1:]


def _with_marks(message: Message) -> list[Message]:
    """Return a message with a mark at the beginning of each field, one at a time."""
    marked = []
    if "reasoning_content" in message:
        marked.append(message | {"reasoning_content": OPEN + message["reasoning_content"]})
    if message["content"] or not message.get("tool_calls"):
        marked.append(message | {"content": OPEN + message["content"]})
    if message.get("tool_calls"):
        first, *others = message["tool_calls"]
        function = first["function"] | {"name": OPEN + first["function"]["name"]}
        marked.append(message | {"tool_calls": [first | {"function": function}, *others]})
    return marked


def _span_by_prefix(
    rendering: Rendering, messages: Messages, i: int, prompt: str, ends: Ends
) -> tuple[int, int] | None:
    before, until = rendering.prompt(messages[:i]), rendering.text(messages[: i + 1])
    if not (until.startswith(before) and prompt.startswith(until)):
        return None
    end = ends.end.search(until, len(before))
    if end:
        return len(before), end.end()
    content = messages[i]["content"]
    if messages[i].get("tool_calls") or not prompt.startswith(content, len(before)):
        return None
    return len(before), len(before) + len(content)


def _span_by_mark(rendering: Rendering, messages: Messages, i: int, prompt: str, ends: Ends) -> tuple[int, int] | None:
    content = messages[i]["content"]
    marked = [*messages[:i], messages[i] | {"content": OPEN + content + CLOSE}, *messages[i + 1 :]]
    text = rendering.prompt(marked)
    start, end = text.find(OPEN), text.find(CLOSE) - 1
    if start < 0 or end < start or text.replace(OPEN, "").replace(CLOSE, "") != prompt:
        return None
    following = ends.start.match(prompt, end)
    return start, following.end() if following else end


def _span_of_calls(rendering: Rendering, messages: Messages, i: int, prompt: str, ends: Ends) -> tuple[int, int] | None:
    """Find an answer with calls: from the header of its turn to the token that ends it when it is the last one."""
    history, opened, until = (
        rendering.text(messages[:i]),
        rendering.prompt(messages[:i]),
        rendering.text(messages[: i + 1]),
    )
    header, closing = opened.removeprefix(history), ends.end.search(until)
    if not opened.startswith(history) or not header or not closing:
        return None
    texts = [rendering.prompt([*messages[:i], marked, *messages[i + 1 :]]) for marked in _with_marks(messages[i])]
    starts = [text.index(OPEN) for text in texts if text.replace(OPEN, "") == prompt and OPEN in text]
    begin = prompt.rfind(header, 0, min(starts)) + len(header) if starts else -1
    end = prompt.find(closing[0], max(starts)) if starts else -1
    if begin < len(header) or end < 0 or closing[0] in prompt[begin : min(starts)]:
        return None
    return begin, end + len(closing[0])


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
