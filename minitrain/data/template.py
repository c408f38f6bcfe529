"""Render conversations with the chat template, and tokenize them with a loss mask.

Prompts are rendered as at inference: each response follows exactly what the template renders with
`add_generation_prompt`. The text is split where responses begin and end, and each piece is tokenized separately. So a
prompt has the same ids as at inference, no token crosses a boundary, and the mask is exact to the character.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from minitrain.config.schema import Config
from minitrain.errors import ConfigError, DataError, is_failure

from .examples import Conversation, Messages, PlainText
from .sandbox import Span, UnboundedTemplate, render, render_marked

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
_HIDDEN = "the chat template omits the response. Set chat_template=chatml or your own template"
UNUSUAL = "a\u16a0\u5b57\u2603"  # characters for which some tokenizers have no token
# Private-use characters, which data is not expected to have.
OPEN, CLOSE = "\ue0f0", "\ue0f1"

Piece = tuple[str, bool]  # text, and whether its tokens are targets


@dataclass
class Tokens:
    """One tokenized document of T tokens.

    Attributes:
        mask: Whether each token is a target, shape [T]; the first one never is.
        counts: What the user is told about the document, by key of `COUNTED` in cache.py.
        shared: Number of leading tokens in common with the previous document of the example.
        doc_features: Name -> number (or label) of the document.
        token_features: Name -> one number per token, shape [T].
    """

    ids: list[int]
    mask: list[bool]
    counts: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    doc_features: dict[str, float | str] = field(default_factory=dict)
    token_features: dict[str, list[float]] = field(default_factory=dict)


class Template:
    """A tokenizer with its chat template, for training and inference."""

    def __init__(self, tokenizer, chat_template: str = "auto", train_on: str = "all_turns"):
        """Set the tokenizer's chat template. ChatML also adds its two tokens if they are missing.

        Args:
            chat_template: auto, chatml, none, or the path of a Jinja file.
            train_on: all_turns or last_turn.

        Raises:
            ConfigError: The template does not exist, is not valid Jinja, or does not terminate.
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
                "chat_template: the tokenizer has several templates. Name a .jinja file.", "invalid-template"
            )
        try:
            self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"chat_template: invalid Jinja in line {error.lineno}: {error.message}. Fix the template.",
                "invalid-template",
            ) from None
        except UnboundedTemplate as error:
            raise ConfigError(f"chat_template: {error}. Name another template.", "invalid-template") from None
        except jinja2.TemplateError:
            pass  # some templates refuse this conversation
        self.has_markers = bool(re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template))
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= {tokenizer.eos_token} - {None}  # tokenizers of classifiers may have no EOS
        any_special = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._special_start = re.compile(any_special)
        self._special_end = re.compile(f"(?:{any_special})(?=\\s*$)")
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and self._encode("a", add_special_tokens=True).ids[:1] == [bos]
        self._prepends_space = "".join(self._encode("a").tokens[:1]).startswith(("\u2581", "\u0120"))
        self._loses_characters = not all(self._encode(character).ids for character in UNUSUAL)

    def end_ids(self) -> list[int]:
        """Return the ids that end a response: EOS, and the token with which the template ends a turn."""
        try:
            text = self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except jinja2.TemplateError:  # it refuses this conversation
            return [self.tokenizer.eos_token_id]
        return sorted({self.tokenizer.eos_token_id, self.encode_text(self._closed(text))[-1]})

    # ------------------------------------------------------------------------------------------------ encoding

    def encode(self, example: Conversation | PlainText, n_trained: int | None = None) -> Tokens:
        """Return the tokens of an example, not yet truncated.

        Args:
            n_trained: How many assistant turns are trained on, counted from the last one; None: as `train_on` says.

        Raises:
            DataError: The example cannot be encoded; the caller adds file and line.
        """
        if isinstance(example, PlainText):
            check_texts([example.text])
            ids = self._with_bos(self.encode_text(example.text))
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids.append(self.tokenizer.eos_token_id)
            return Tokens(ids, [False] + [True] * (len(ids) - 1))
        check_texts([message["content"] for message in example.messages])
        if n_trained is None and self.train_on == "last_turn":
            n_trained = 1
        try:
            pieces, counts = self._pieces(example.messages, n_trained)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}", "invalid-template") from None
        return self._join(pieces, counts)

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Return the ids of a prompt, up to the start of the response, as in training."""
        check_texts([message["content"] for message in messages])
        try:
            prompt = self._render(messages, prompt=True)
            spans = self._earlier_spans(messages, prompt)[0] if len(messages) > 1 else []
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}", "invalid-template") from None
        return self._join(_split(prompt, spans, []), {}).ids

    def encode_text(self, text: str, before: str = "") -> list[int]:
        """Return the ids of a piece of text after the text `before`, without a special token at its start.

        At the start of a text, or after a special token, some tokenizers add a space and others strip one. So the piece
        is tokenized after an anchor (the special token at the end of `before`, or a newline), whose ids are removed.
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
        """The inner `tokenizers.Tokenizer`, ten times as fast, without truncation or padding set by earlier calls."""
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation or backend.padding:
            backend.no_truncation()
            backend.no_padding()
        return backend

    def _encode(self, text: str, add_special_tokens: bool = False):
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:  # a damaged tokenizer panics
            if not is_failure(error):
                raise
            raise DataError(f"the tokenizer fails for {text[:40]!r}: {error}", "invalid-text") from None

    def _ids(self, text: str) -> list[int]:
        ids = self._encode(text).ids
        if self._loses_characters:
            self._check_no_lost_characters(text)
        return ids

    def _check_no_lost_characters(self, text: str) -> None:
        """Raise DataError for a character that the tokenizer silently drops."""
        for character in sorted(set(text)):
            if not character.isspace() and not self._encode(character).ids:
                raise DataError(f"the tokenizer has no token for {character!r} and would drop it", "invalid-text")

    def _join(self, pieces: list[Piece], counts: dict[str, int]) -> Tokens:
        ids, mask, before = [], [], ""
        for text, is_target in pieces:
            piece_ids = self.encode_text(text, before)
            ids += piece_ids
            mask += [is_target] * len(piece_ids)
            before = text or before
        if not ids:
            raise DataError("the tokenizer returns no tokens for the text", "invalid-text")
        n = len(ids)
        ids = self._with_bos(ids)
        mask = [False] * (len(ids) - n) + mask
        mask[0] = False
        return Tokens(ids, mask, counts)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Return the ids with exactly one BOS if the tokenizer adds it, even if the template wrote it, too."""
        bos = self.tokenizer.bos_token_id
        if self._adds_bos and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    # ------------------------------------------------------------------------------------------- response spans

    def _render(self, messages: Messages, prompt: bool = False) -> str:
        variables = self.tokenizer.special_tokens_map
        return render(self.tokenizer.chat_template, messages, add_generation_prompt=prompt, **variables)

    def _pieces(self, messages: Messages, n_trained: int | None) -> tuple[list[Piece], dict[str, int]]:
        """Return the text up to the last response in pieces, and counts of what is not trained on."""
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        messages = messages[: last + 1]
        if self.has_markers:
            (text, spans), n_lost = self._marked(messages), 0
        else:
            prompt, response = self._split_response(messages)
            spans, n_lost = self._earlier_spans(messages[:-1], prompt)
            text = prompt + response
            spans.append((len(prompt), len(text)))
        if n_trained is not None:  # split at all spans, so that the ids are the same as with all_turns
            return _split(text, spans, spans[-n_trained:]), {}
        return _split(text, spans, spans), {"untrained-turns": n_lost} if n_lost else {}

    def _marked(self, messages: Messages) -> tuple[str, list[Span]]:
        """Return the text and its {% generation %} spans, each extended by the token that ends its turn."""
        variables = self.tokenizer.special_tokens_map
        text, spans = render_marked(self.tokenizer.chat_template, messages, add_generation_prompt=False, **variables)
        closed = []
        for start, end in spans:
            token = self._special_end.search(text, start, end) or self._special_start.match(text, end)
            closed.append((start, token.end() if token else end))
        if not closed:
            raise DataError(
                "the chat template marks no response in this conversation with {% generation %}", "invalid-template"
            )
        text = text[: closed[-1][1]]
        if self._special_end.search(text):
            return text, closed
        text += self.tokenizer.eos_token
        return text, [*closed[:-1], (closed[-1][0], len(text))]

    def _split_response(self, messages: Messages) -> tuple[str, str]:
        """Return (the text before the last response, as at inference; the response with its end token)."""
        if len(messages) == 1:
            return self._split_at_mark(messages)
        text, prompt = self._render(messages), self._render(messages[:-1], prompt=True)
        if text.startswith(prompt):
            if text == prompt and messages[-1]["content"].strip():
                raise DataError(_HIDDEN, "invalid-template")
            return prompt, self._closed(text[len(prompt) :])
        history = self._render(messages[:-1])
        common = _common_prefix(text, prompt)
        if common > len(history) and text.startswith(history):
            # The generation prompt begins a response differently, such as with an empty <think> block.
            return text[:common], self._closed(text[common:])
        # The template renders the history differently when a response follows: keep the prompt of inference.
        return prompt, self._split_at_mark(messages)[1]

    def _split_at_mark(self, messages: Messages) -> tuple[str, str]:
        marked = {"role": "assistant", "content": OPEN + messages[-1]["content"]}
        before, mark, tail = self._render([*messages[:-1], marked]).rpartition(OPEN)
        if not mark:
            raise DataError(_HIDDEN, "invalid-template")
        return before, self._closed(tail)

    def _closed(self, tail: str) -> str:
        """Return a response up to its end token, or with EOS if it has none."""
        end = self._special_end.search(tail)
        return tail[: end.end()] if end else tail.rstrip("\n") + self.tokenizer.eos_token

    def _earlier_spans(self, messages: Messages, prompt: str) -> tuple[list[Span], int]:
        """Return the spans of earlier responses in `prompt`, and how many of them `prompt` does not have verbatim."""
        spans, n_lost = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # There is nothing to render before the first turn, so its header would count as part of the response.
            span = self._span_by_prefix(messages, i, prompt) if i else None
            span = span or self._span_by_mark(messages, i, prompt)
            if span:
                spans.append(span)
            else:
                n_lost += 1
        return spans, n_lost

    def _span_by_prefix(self, messages: Messages, i: int, prompt: str) -> Span | None:
        before = self._render(messages[:i], prompt=True)
        until = self._render(messages[: i + 1])
        if not (until.startswith(before) and prompt.startswith(until)):
            return None
        end = self._special_end.search(until, len(before))
        if end:
            return len(before), end.end()
        content = messages[i]["content"]
        return (len(before), len(before) + len(content)) if prompt.startswith(content, len(before)) else None

    def _span_by_mark(self, messages: Messages, i: int, prompt: str) -> Span | None:
        content = messages[i]["content"]
        marked = [*messages[:i], {"role": "assistant", "content": OPEN + content + CLOSE}, *messages[i + 1 :]]
        text = self._render(marked, prompt=True)
        start, end = text.find(OPEN), text.find(CLOSE) - 1
        if start < 0 or end < start or text.replace(OPEN, "").replace(CLOSE, "") != prompt:
            return None
        end_token = self._special_start.match(prompt, end)
        return start, end_token.end() if end_token else end


def make_template(tokenizer, config: Config, kind: str) -> Template:
    """Return the template for examples of a kind; texts to classify get no chat template."""
    return Template(tokenizer, "none" if kind == "classification" else config.chat_template, config.train_on)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"chat_template: expected auto, chatml, none or a text file, got {file!r}.", "not-found"
        ) from None


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def check_texts(texts: list[str]) -> None:
    """Raise DataError for characters that cannot be tokenized, or that this module uses as marks."""
    text = "".join(texts)
    if OPEN in text or CLOSE in text:
        raise DataError("the text has U+E0F0 or U+E0F1, which minitrain reserves to mark responses", "invalid-text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has {text[error.start]!r}, half of a surrogate pair, which is not a character", "invalid-text"
        ) from None


def _split(text: str, spans: list[Span], targets: list[Span]) -> list[Piece]:
    """Split a text at spans. A piece is a target if its span is in `targets`."""
    pieces, position = [], 0
    for start, end in spans:
        pieces += [(text[position:start], False), (text[start:end], (start, end) in targets)]
        position = end
    return [*pieces, (text[position:], False)]
