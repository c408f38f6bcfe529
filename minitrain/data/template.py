"""Records -> token ids and loss mask, through the chat template.

The text is built as inference builds it: up to each answer stands exactly what the template gives with
`add_generation_prompt`. It is cut at the borders of the learned spans and the pieces are tokenised apart, so
the prompt's ids are those of inference, no token straddles a border, and the mask is exact to the character.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from minitrain.config.schema import Config
from minitrain.errors import ConfigError, DataError, is_failure

from .examples import Conversation, PlainText
from .sandbox import UnboundedTemplate, render, render_marked

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
_HIDDEN = "the chat template hides the answer; give chat_template=chatml or a template of your own"
UNUSUAL = "a\u16a0\u5b57\u2603"  # characters that not every tokenizer has a token for
# Private-use characters, which no text of a data set should hold.
OPEN, CLOSE = "\ue0f0", "\ue0f1"


@dataclass
class Tokens:
    """One document: ids and whether each is learned; the first never is. `notes` counts what was done to it."""

    ids: list[int]
    mask: list[bool]
    notes: dict[str, int] = field(default_factory=dict)
    shared: int = 0  # leading tokens that are those of the document before it, of the same example
    doc_features: dict[str, float | str] = field(default_factory=dict)  # of the whole document
    token_features: dict[str, list[float]] = field(default_factory=dict)  # of each token


class Template:
    """A tokenizer with a chat template, made ready for training."""

    def __init__(self, tokenizer, chat_template: str = "auto", train_on: str = "all_turns"):
        """Sets the tokenizer's template, and adds ChatML's two tokens where ChatML is used and they are missing.

        Args:
            chat_template: auto, chatml, none, or the path of a jinja file.
            train_on: all_turns or last_turn.
        """
        self.tokenizer = tokenizer
        self.train_on = train_on
        if chat_template == "chatml" or (chat_template == "auto" and not tokenizer.chat_template):
            added = {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
            tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
            tokenizer.chat_template = CHATML
        elif chat_template == "none":
            tokenizer.chat_template = PLAIN
        elif chat_template != "auto":
            tokenizer.chat_template = _read(chat_template)
        if not isinstance(tokenizer.chat_template, str):
            raise ConfigError(
                "chat_template: the tokenizer has several templates; name a .jinja file.", "invalid-template"
            )
        try:
            self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"chat_template: not valid Jinja, line {error.lineno}: {error.message}", "invalid-template"
            ) from None
        except UnboundedTemplate as error:
            raise ConfigError(f"chat_template: {error}. Name another template.", "invalid-template") from None
        except jinja2.TemplateError:
            pass  # a template may refuse this very conversation
        self.has_markers = bool(re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template))
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= {tokenizer.eos_token} - {None}  # models that classify may have none
        any_special = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._special_start = re.compile(any_special)
        self._special_end = re.compile(f"(?:{any_special})(?=\\s*$)")
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and self._encode("a", add_special_tokens=True).ids[:1] == [bos]
        self._prepends_space = "".join(self._encode("a").tokens[:1]).startswith(("\u2581", "\u0120"))
        self._loses_characters = not all(self._encode(character).ids for character in UNUSUAL)

    def end_ids(self) -> list[int]:
        """The tokens that end a turn, for generation: EOS and the one this template closes an answer with."""
        try:
            text = self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except jinja2.TemplateError:  # it refuses this very conversation
            return [self.tokenizer.eos_token_id]
        return sorted({self.tokenizer.eos_token_id, self.encode_text(self._closed(text))[-1]})

    # ------------------------------------------------------------------------------------------------ encoding

    def encode(self, record: Conversation | PlainText, n_learned: int | None = None) -> Tokens:
        """Token ids and mask of a whole record, not yet truncated. Raises DataError for what cannot be encoded.

        `n_learned`: how many answers, counted from the last one, are learned; what `train_on` says when left out.
        """
        if isinstance(record, PlainText):
            refuse_unusable([record.text])
            ids = self._with_bos(self.encode_text(record.text))
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids.append(self.tokenizer.eos_token_id)
            return Tokens(ids, [False] + [True] * (len(ids) - 1))
        refuse_unusable([message["content"] for message in record.messages])
        if n_learned is None and self.train_on == "last_turn":
            n_learned = 1
        try:
            pieces, notes = self._pieces(record.messages, n_learned)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}", "invalid-template") from None
        return self._join(pieces, notes)

    def encode_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids up to where the assistant begins to answer, made as in training."""
        refuse_unusable([message["content"] for message in messages])
        try:
            prompt = self._render(messages, prompt=True)
            spans = self._earlier_spans(messages, prompt)[0] if len(messages) > 1 else []
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}", "invalid-template") from None
        return self._join(_cut(prompt, spans, []), {}).ids

    def encode_text(self, text: str, before: str = "") -> list[int]:
        """Ids of a piece of text that stands behind `before`, as they would be in the middle of the whole text.

        Some tokenizers put a space before a text or behind a special token, others strip one there. So the piece
        is tokenised behind an anchor, whose ids are taken off again.
        """
        if not text:
            return []
        end = self._special_end.search(before)
        anchor = before[end.start() :] if end else "\n" if before and self._prepends_space else ""
        if anchor:
            anchor_ids, ids = self._ids(anchor), self._ids(anchor + text)
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return self._ids(text)

    @property
    def backend(self):
        """The tokenizers.Tokenizer inside, ten times as quick, without what another call may have left in it."""
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation or backend.padding:
            backend.no_truncation()
            backend.no_padding()
        return backend

    def _encode(self, text: str, add_special_tokens: bool = False):
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:  # of a tokenizer that is damaged
            if not is_failure(error):
                raise
            raise DataError(f"the tokenizer cannot read {text[:40]!r}: {error}", "invalid-text") from None

    def _ids(self, text: str) -> list[int]:
        ids = self._encode(text).ids
        if self._loses_characters:
            self._refuse_lost(text)
        return ids

    def _refuse_lost(self, text: str) -> None:
        """Raise DataError for a character that the tokenizer leaves out without a word."""
        for character in sorted(set(text)):
            if not character.isspace() and not self._encode(character).ids:
                raise DataError(f"the tokenizer has no token for {character!r}, and would leave it out", "invalid-text")

    def _join(self, pieces: list[tuple[str, bool]], notes: dict[str, int]) -> Tokens:
        ids, mask, before = [], [], ""
        for text, learned in pieces:
            part = self.encode_text(text, before)
            ids += part
            mask += [learned] * len(part)
            before = text or before
        if not ids:
            raise DataError("the tokenizer makes no token of the text", "invalid-text")
        n = len(ids)
        ids = self._with_bos(ids)
        mask = [False] * (len(ids) - n) + mask
        mask[0] = False
        return Tokens(ids, mask, notes)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """One BOS where the tokenizer uses one, whether or not the template wrote it."""
        bos = self.tokenizer.bos_token_id
        if self._adds_bos and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    # ------------------------------------------------------------------------------------------- finding answers

    def _render(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        variables = self.tokenizer.special_tokens_map
        return render(self.tokenizer.chat_template, messages, add_generation_prompt=prompt, **variables)

    def _pieces(
        self, messages: list[dict[str, str]], n_learned: int | None
    ) -> tuple[list[tuple[str, bool]], dict[str, int]]:
        """The conversation as pieces of text, each learned or not; ends with the last answer."""
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        messages = messages[: last + 1]
        if self.has_markers:
            (text, spans), lost = self._marked(messages), 0
        else:
            prompt, tail = self._split_answer(messages)
            spans, lost = self._earlier_spans(messages[:-1], prompt)
            text = prompt + tail
            spans.append((len(prompt), len(text)))
        if n_learned is not None:  # cut where all_turns cuts, so that the ids are the same
            return _cut(text, spans, spans[-n_learned:]), {}
        return _cut(text, spans, spans), {"unlearned-turns": lost} if lost else {}

    def _marked(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The text and the spans inside {% generation %}, each with the token that ends its turn."""
        variables = self.tokenizer.special_tokens_map
        text, spans = render_marked(self.tokenizer.chat_template, messages, add_generation_prompt=False, **variables)
        closed = []
        for start, end in spans:
            token = self._special_end.search(text, start, end) or self._special_start.match(text, end)
            closed.append((start, token.end() if token else end))
        if not closed:
            raise DataError("the chat template marks no text of the assistant in this conversation", "invalid-template")
        text = text[: closed[-1][1]]
        return (text, closed) if self._special_end.search(text) else self._ended(text, closed)

    def _ended(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        text += self.tokenizer.eos_token
        return text, [*spans[:-1], (spans[-1][0], len(text))]

    def _split_answer(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """(what stands before the last answer at inference, the answer with the token that ends it)."""
        if len(messages) == 1:
            return self._split_at_mark(messages)
        whole, prompt = self._render(messages), self._render(messages[:-1], prompt=True)
        if whole.startswith(prompt):
            if whole == prompt and messages[-1]["content"].strip():
                raise DataError(_HIDDEN, "invalid-template")
            return prompt, self._closed(whole[len(prompt) :])
        history = self._render(messages[:-1])
        common = _common_prefix(whole, prompt)
        if common > len(history) and whole.startswith(history):
            # The prompt opens the answer in another way than this one, e.g. an empty thought before a thought.
            return whole[:common], self._closed(whole[common:])
        # The template writes the history otherwise once it is answered: keep the prompt of inference.
        return prompt, self._split_at_mark(messages)[1]

    def _split_at_mark(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        answer = {"role": "assistant", "content": OPEN + messages[-1]["content"]}
        before, mark, tail = self._render([*messages[:-1], answer]).rpartition(OPEN)
        if not mark:
            raise DataError(_HIDDEN, "invalid-template")
        return before, self._closed(tail)

    def _closed(self, tail: str) -> str:
        """An answer with its end token as the last: what follows it is dropped, EOS is added where there is none."""
        end = self._special_end.search(tail)
        return tail[: end.end()] if end else tail.rstrip("\n") + self.tokenizer.eos_token

    def _earlier_spans(self, messages: list[dict[str, str]], prompt: str) -> tuple[list[tuple[int, int]], int]:
        """Spans in `prompt` of the answers already given, and how many are not there word for word."""
        spans, lost = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # Before a first turn there is nothing to render, so that its header would count as answer.
            span = self._span_by_prefix(messages, i, prompt) if i else None
            span = span or self._span_by_mark(messages, i, prompt)
            if span:
                spans.append(span)
            else:
                lost += 1
        return spans, lost

    def _span_by_prefix(self, messages: list, i: int, prompt: str) -> tuple[int, int] | None:
        before = self._render(messages[:i], prompt=True)
        until = self._render(messages[: i + 1])
        if not (until.startswith(before) and prompt.startswith(until)):
            return None
        end = self._special_end.search(until, len(before))
        if end:
            return len(before), end.end()
        content = messages[i]["content"]
        return (len(before), len(before) + len(content)) if prompt.startswith(content, len(before)) else None

    def _span_by_mark(self, messages: list, i: int, prompt: str) -> tuple[int, int] | None:
        content = messages[i]["content"]
        marked = [*messages[:i], {"role": "assistant", "content": OPEN + content + CLOSE}, *messages[i + 1 :]]
        text = self._render(marked, prompt=True)
        start, end = text.find(OPEN), text.find(CLOSE) - 1
        if start < 0 or end < start or text.replace(OPEN, "").replace(CLOSE, "") != prompt:
            return None
        following = self._special_start.match(prompt, end)
        return start, following.end() if following else end


def make_template(tokenizer, config: Config, kind: str) -> Template:
    """The template for records of a kind; texts that are to be labelled are read as they are."""
    return Template(tokenizer, "none" if kind == "classification" else config.chat_template, config.train_on)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"the chat template {file!r} is neither auto, chatml, none, nor a text file.", "not-found"
        ) from None


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def refuse_unusable(texts: list[str]) -> None:
    """Raises DataError for characters that no tokenizer can take, or that have a meaning here."""
    whole = "".join(texts)
    if OPEN in whole or CLOSE in whole:
        raise DataError(
            "the text holds U+E0F0 or U+E0F1, characters of private use that mark answers here", "invalid-text"
        )
    try:
        whole.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds {whole[error.start]!r}, half a surrogate pair, which is no character", "invalid-text"
        ) from None


def _cut(text: str, spans: list[tuple[int, int]], learned: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The text in pieces: the spans, each with whether it is learned, and what stands between them."""
    pieces, position = [], 0
    for start, end in spans:
        pieces += [(text[position:start], False), (text[start:end], (start, end) in learned)]
        position = end
    return [*pieces, (text[position:], False)]
