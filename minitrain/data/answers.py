"""Where the answers are in a rendered conversation.

The text before an answer is what the template gives at inference (`add_generation_prompt`), so that an answer begins
where the model begins to write.
"""

import dataclasses
import re
from dataclasses import dataclass

from minitrain.errors import DataError

from .messages import CLOSE, OPEN, THINK_END, Message, Messages, split_reasoning
from .rendering import Rendering

MAX_TOKEN = 64  # characters of a special token
THOUGHT_OPENER = re.compile(r"<(think|thinking|reasoning)>\s*$")
_HIDDEN = "the chat template hides the answer; give chat_template=chatml or a template of your own"


@dataclass
class Ends:
    """The tokens that may end a turn, as regular expressions.

    Attributes:
        appends_eos: Whether the template writes EOS after the last turn, which ends in another token, as Phi-3's.
    """

    any_special: str
    eos_token: str
    appends_eos: bool = False

    def __post_init__(self):
        self.start = re.compile(self.any_special)
        self.end = re.compile(f"(?:{self.any_special})(?=\\s*$)")

    def close(self, tail: str) -> str:
        """Return an answer that ends in its end token: what follows is cut, and EOS is added if there is none."""
        if self.appends_eos:
            tail = tail.removesuffix(self.eos_token)
        end = self.end.search(tail)
        return tail[: end.end()] if end else tail.rstrip("\n") + self.eos_token


@dataclass(frozen=True)
class Answer:
    """The span of one answer in a text, and which message it is.

    Attributes:
        after_other_prompt: Whether the text before it differs from the prompt at inference.
    """

    start: int
    stop: int
    turn: int
    after_other_prompt: bool = False


@dataclass
class Answered:
    """A conversation as text, with its answers in order."""

    text: str
    answers: list[Answer]


def find_answers(
    rendering: Rendering, messages: Messages, ends: Ends, has_markers: bool, earlier: Answered | None = None
) -> Answered:
    """Render a conversation that ends with an answer, and find all answers in it.

    Args:
        has_markers: Whether the template marks answers with {% generation %}.
        earlier: What was found in a beginning of the conversation, to save time.

    Raises:
        DataError: The last answer is not in the text.
        jinja2.TemplateError: The template refuses the conversation.
    """
    if has_markers and (marked := _marked(rendering, messages, ends)):
        return marked
    prompt, tail, is_other = _split_answer(rendering, messages, ends)
    found = find_earlier(rendering, messages[:-1], prompt, ends, earlier)
    found.answers.append(Answer(len(prompt), len(prompt) + len(tail), len(messages) - 1, is_other))
    return Answered(prompt + tail, found.answers)


def find_earlier(
    rendering: Rendering, messages: Messages, prompt: str, ends: Ends, earlier: Answered | None = None
) -> Answered:
    """Find the answers in a prompt that was rendered from `messages`; those that it has in other words are left out."""
    answers = _in_both(earlier, prompt) if earlier else []
    first = answers[-1].turn + 1 if answers else 0
    for i, message in enumerate(messages[first:], first):
        if message["role"] == "assistant":
            # Before a first turn there is nothing to render, so its header would count as part of the answer.
            before = rendering.prompt(messages[:i]) if i else None
            span = _span_by_prefix(rendering, messages, i, before, prompt, ends) if before is not None else None
            by_mark = _span_of_calls if message.get("tool_calls") else _span_by_mark
            span = span or by_mark(rendering, messages, i, prompt, ends)
            if span and before and prompt.startswith(before):
                span = min(span[0], len(before)), span[1]
            answers += [Answer(*span, i, before not in (None, prompt[: span[0]]))] if span else []
    return Answered(prompt, answers)


def _in_both(earlier: Answered, prompt: str) -> list[Answer]:
    """Return the answers in the beginning that two texts have in common, with the token that follows each."""
    for n in range(len(earlier.answers), 0, -1):
        stop = earlier.answers[n - 1].stop + MAX_TOKEN
        if len(earlier.text) >= stop and prompt.startswith(earlier.text[:stop]):
            return earlier.answers[:n]
    return []


def _marked(rendering: Rendering, messages: Messages, ends: Ends) -> Answered | None:
    """Find the spans inside {% generation %}, each with the token that ends its turn.

    Returns None if the template does not mark one span for each answer, or writes the prompt in other words.
    """
    text, spans = rendering.marked(messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompt = rendering.prompt(messages[:-1]) if messages[:-1] else ""
    if len(turns) != len(spans) or not text.startswith(prompt):
        return None
    answers, header = [], rendering.header()
    for turn, (start, stop) in zip(turns, spans):
        n = len(header)  # which inference writes, also if the template marks its end
        begin = text.find(header, max(0, start - n), start + n) if n else -1
        start = begin + n if begin >= 0 else start
        if prompt and turn == turns[-1]:
            start = len(prompt) if len(prompt) < stop else start
        # To render each prompt takes long, so only those whose end differs are.
        is_other = turn > 0 and not text.endswith(header, 0, start)
        is_other = is_other and text[:start] != rendering.prompt(messages[:turn])
        token = ends.end.search(text, start, stop) or ends.start.match(text, stop)
        answers.append(Answer(start, token.end() if token else stop, turn, is_other))
    text = text[: answers[-1].stop]
    if not ends.end.search(text):
        text += ends.eos_token
        answers[-1] = dataclasses.replace(answers[-1], stop=len(text))
    return Answered(text, answers)


def _split_answer(rendering: Rendering, messages: Messages, ends: Ends) -> tuple[str, str, bool]:
    """Return the text before the last answer, the answer with the token that ends it, and whether the first differs.

    The text before the answer is the prompt at inference, unless the template has another one for this answer.
    """
    if len(messages) == 1:
        return (*_split_at_mark(rendering, messages, ends), False)
    full, prompt = rendering.text(messages), rendering.prompt(messages[:-1])
    if full.startswith(prompt):
        if full == prompt:
            raise DataError(_HIDDEN, "invalid-template")
        return prompt, ends.close(full[len(prompt) :]), False
    opener = THOUGHT_OPENER.search(prompt)
    if opener and full.startswith(prompt[: opener.start()]):
        return prompt, _continue_thought(messages[-1], opener, full[opener.start() :], ends), False
    history = rendering.text(messages[:-1])
    if prompt.startswith(history) and full.startswith(history) and len(prompt) > len(history):
        # The prompt opens the answer in another way than this one, e.g. an empty thought before a thought.
        common = _common_prefix(full, prompt, ends)
        return full[:common], ends.close(full[common:]), True
    # The template writes the history in other words once it is answered: keep the prompt of inference.
    if prompt.startswith(history) and (header := prompt[len(history) :]):
        before, answer = _split_at_mark(rendering, messages, ends)
        begin = before.rfind(header)
        return prompt, (before + answer)[begin + len(header) :] if begin >= 0 else answer, begin < 0
    return prompt, _split_at_mark(rendering, messages, ends)[1], False


def _continue_thought(answer: Message, opener: re.Match, tail: str, ends: Ends) -> str:
    """Return an answer after a prompt that opens a thought which the template itself does not write, as DeepSeek-R1's.

    Args:
        tail: What the template writes of the answer, without its reasoning.
    """
    reasoning, _ = split_reasoning(answer)
    return f"{reasoning}\n</{opener[1]}>\n\n{ends.close(tail)}"


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
    rendering: Rendering, messages: Messages, i: int, before: str, prompt: str, ends: Ends
) -> tuple[int, int] | None:
    """Find an answer that both follows its prompt at inference (`before`) and is the same without later turns."""
    until = rendering.text(messages[: i + 1])
    if ends.appends_eos:
        until = until.removesuffix(ends.eos_token)
    if not (until.startswith(before) and prompt.startswith(until)):
        return None
    end = ends.end.search(until, len(before)) or ends.start.match(prompt, len(until))  # or what begins the next turn
    if end:
        return len(before), end.end()
    content = messages[i]["content"]
    if messages[i].get("tool_calls") or not prompt.startswith(content, len(before)):
        return None
    return len(before), len(before) + len(content)


def _span_by_mark(rendering: Rendering, messages: Messages, i: int, prompt: str, ends: Ends) -> tuple[int, int] | None:
    content = messages[i]["content"]
    answer = content.rpartition(THINK_END)[2].strip()
    for part in dict.fromkeys((content, answer)):  # of earlier turns, templates may leave out the rest
        n = content.rindex(part)
        marked = messages[i] | {"content": content[:n] + OPEN + part + CLOSE + content[n + len(part) :]}
        text = rendering.prompt([*messages[:i], marked, *messages[i + 1 :]])
        start, end = text.find(OPEN), text.find(CLOSE) - 1
        if 0 <= start <= end and text.replace(OPEN, "").replace(CLOSE, "") == prompt:
            following = ends.start.match(prompt, end)
            return start, following.end() if following else end
    return None


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


def _common_prefix(a: str, b: str, ends: Ends) -> int:
    """Return the length of the common beginning of two texts, without a part of a special token."""
    n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return next((token.start() for token in ends.start.finditer(a) if token.start() < n < token.end()), n)
