"""Pieces of a text -> token ids as in the middle of the full text, and special tokens in data as ordinary text."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from minitrain.batch import TARGET_WEIGHTS
from minitrain.errors import DataError, is_failure

from .answers import Ends
from .counts import Uses
from .messages import CLOSE, LITERAL, OPEN

UNUSUAL = "a\u16a0\u5b57\u2603"  # characters that not every tokenizer has a token for


@dataclass
class Tokens:
    """One tokenized document of T tokens.

    Attributes:
        mask: Whether each token is a target, shape [T]; the first one never is.
        counts: What is reported about the document, by key of `COUNTED` in counts.py.
        shared: Number of leading tokens in common with the last document before it in the example that has 0 here.
        doc_features: Name -> number (or label) of the document.
        token_features: Name -> one number per token, shape [T].
        turns: The turns that are trained on.
        uses: What becomes of each field of the turns.
    """

    ids: list[int]
    mask: list[bool]
    counts: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    doc_features: dict[str, float | str] = field(default_factory=dict)
    token_features: dict[str, list[float]] = field(default_factory=dict)
    turns: list[int] = field(default_factory=list)
    uses: Uses = field(default_factory=dict)


class Piece(NamedTuple):
    """A part of a text that is tokenized by itself."""

    text: str
    weight: float = 0.0  # in the loss; 0 is not trained on
    turn: int | None = None  # the message it is the answer of
    untrained: tuple[int, int] = (0, 0)  # characters that are not trained on either


@dataclass
class RenderedDocument:
    """A document before it is tokenized. `counts`, `turns` and `uses` are those of its `Tokens`."""

    pieces: list[Piece]
    counts: dict[str, int] = field(default_factory=dict)
    turns: list[int] = field(default_factory=list)
    uses: Uses = field(default_factory=dict)


class TextEncoder:
    """A tokenizer for pieces of rendered conversations."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {tokenizer.eos_token} - {None}  # models that classify may have none
        tokens = sorted(special, key=len, reverse=True)
        self.ends = Ends("|".join(map(re.escape, tokens)) or "(?!)", tokenizer.eos_token)
        self._literal = re.compile("|".join(re.escape(_literal(token)) for token in tokens) or "(?!)")
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and self._encode("a", add_special_tokens=True).ids[:1] == [bos]
        self._prepends_space = "".join(self._encode("a", with_offsets=True).tokens[:1]).startswith(("\u2581", "\u0120"))
        self._ids_of_anchors: dict[str, list[int]] = {}
        self._ids_ahead: dict[str, list[int]] = {}  # of texts with their anchors, by `encoding_ahead`
        self._loses_characters = not all(self._encode(character).ids for character in UNUSUAL)

    def mark_literals(self, text: str) -> str:
        """Return a text whose special tokens are marked as ordinary text, for templates and for `encode_text`."""
        return self.ends.start.sub(lambda match: _literal(match[0]), text)

    def encode_text(self, text: str, before: str = "") -> list[int]:
        """Return the ids of a piece of text that follows `before`, as they are in the middle of the full text.

        Some tokenizers put a space before a text or after a special token, others strip one there. So the piece is
        tokenized after an anchor, whose ids are removed.
        """
        return self._encode_after(text, before, with_starts=False)[0]

    def _encode_after(self, text: str, before: str, with_starts: bool) -> tuple[list[int], list[int]]:
        """Return ids and, with `with_starts`, which takes time, the character at which each begins in `text`."""
        if LITERAL in text:
            return self._encode_literals(text, before, with_starts)
        if not text:
            return [], []
        anchor, n = self._anchor(before), 0
        ids, starts = self._checked_ids(anchor + text, with_starts)
        if anchor:
            if anchor not in self._ids_of_anchors:  # few: a special token, and white space
                self._ids_of_anchors[anchor], _ = self._checked_ids(anchor)
            anchor_ids = self._ids_of_anchors[anchor]
            n = len(anchor_ids)
            if ids[:n] != anchor_ids:
                anchor, n = "", 0
                ids, starts = self._checked_ids(text, with_starts)
        return ids[n:], [start - len(anchor) for start in starts[n:]]

    def _anchor(self, before: str) -> str:
        """Return what a piece of text that follows `before` is tokenized after."""
        end = self.ends.end.search(before)
        return before[end.start() :] if end else "\n" if before and self._prepends_space else ""

    @contextlib.contextmanager
    def encoding_ahead(self, documents: Iterable[RenderedDocument]) -> Iterator[None]:
        """Tokenize the pieces of documents in one call, which is faster, for the calls of `join` inside."""
        texts = {text: None for document in documents for text in self._anchored_texts(document)}
        try:
            encodings = self.backend.encode_batch_fast([*texts], add_special_tokens=False)
        except BaseException as error:
            if not is_failure(error):
                raise
            encodings = []  # `join` reports the document that fails
        self._ids_ahead = {text: encoding.ids for text, encoding in zip(texts, encodings)}
        try:
            yield
        finally:
            self._ids_ahead = {}

    def _anchored_texts(self, document: RenderedDocument) -> Iterator[str]:
        """Yield what the tokenizer is given for the pieces of a document without literal special tokens."""
        before = ""
        for piece in document.pieces:
            if piece.text and LITERAL not in piece.text:
                yield self._anchor(before) + piece.text
            before = piece.text or before

    def _encode_literals(self, text: str, before: str, with_starts: bool) -> tuple[list[int], list[int]]:
        """Encode a text with special tokens that are ordinary text."""
        ids, starts, position = [], [], 0
        for match in [*self._literal.finditer(text), None]:
            stop = match.start() if match else len(text)
            part, offsets = self._encode_after(text[position:stop], before, with_starts)
            ids, starts = ids + part, starts + [position + offset for offset in offsets]
            if match:
                token = match[0].replace(LITERAL, "")
                part = self._encode_as_text(token)
                ids, starts = ids + part, starts + [stop] * len(part if with_starts else [])
                before, position = "a", match.end()  # in the middle of a text
        return ids, starts

    def _encode_as_text(self, token: str) -> list[int]:
        """Return the ids of a special token's characters."""
        backend = self.backend
        backend.encode_special_tokens = True
        try:
            ids = self._encode("a" + token).ids
            head = self._encode("a").ids
            return ids[len(head) :] if ids[: len(head)] == head else self._encode(token).ids
        finally:
            backend.encode_special_tokens = False

    @property
    def backend(self):
        """The tokenizers.Tokenizer inside, ten times as fast, without what another call may have left in it."""
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation or backend.padding:
            backend.no_truncation()
            backend.no_padding()
        return backend

    def _encode(self, text: str, add_special_tokens: bool = False, with_offsets: bool = False):
        backend = self.backend
        try:
            if with_offsets:  # and with tokens, which take time, too
                return backend.encode(text, add_special_tokens=add_special_tokens)
            return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except BaseException as error:  # of a tokenizer that is damaged
            if not is_failure(error):
                raise
            raise DataError(f"the tokenizer cannot read {text[:40]!r}: {error}", "invalid-text") from None

    def _checked_ids(self, text: str, with_starts: bool = False) -> tuple[list[int], list[int]]:
        """Return ids and, with `with_starts`, which takes time, the character at which each begins."""
        ids, starts = self._ids_ahead.get(text), []
        if with_starts:
            encoding = self._encode(text, with_offsets=True)
            ids, starts = encoding.ids, [start for start, _ in encoding.offsets]
        elif ids is None:
            ids = self._encode(text).ids
        if self._loses_characters:
            self._refuse_lost(text)
        return ids, starts

    def _refuse_lost(self, text: str) -> None:
        """Raise DataError for a character that the tokenizer drops."""
        for character in sorted(set(text)):
            if not character.isspace() and not self._encode(character).ids:
                raise DataError(f"the tokenizer has no token for {character!r} and would drop it", "invalid-text")

    def join(self, document: RenderedDocument) -> Tokens:
        """Return the document that pieces make, with one BOS where the tokenizer uses one."""
        ids, weights, before = [], [], ""
        for piece in document.pieces:
            first, last = piece.untrained
            part, starts = self._encode_after(piece.text, before, with_starts=last > 0)
            ids += part
            if last:
                weights += [0.0 if first <= start < last else piece.weight for start in starts]
            else:
                weights += [piece.weight] * len(part)
            before = piece.text or before
        if not ids:
            raise DataError("the tokenizer makes no token of the text", "invalid-text")
        n = len(ids)
        ids = self.with_bos(ids)
        weights = [0.0] * (len(ids) - n) + weights
        weights[0] = 0.0
        mask = list(map(bool, weights))  # no weight is below 0
        tokens = Tokens(ids, mask, document.counts, turns=document.turns, uses=document.uses)
        if {piece.weight for piece in document.pieces if piece.text} - {0.0, 1.0}:
            tokens.token_features[TARGET_WEIGHTS] = weights
        return tokens

    def with_bos(self, ids: list[int]) -> list[int]:
        """Return ids with one BOS where the tokenizer uses one, whether or not the template wrote it."""
        bos = self.tokenizer.bos_token_id
        if self._adds_bos and ids[:1] != [bos]:
            return [bos, *ids]
        return ids


def check_texts(texts: list[str]) -> None:
    """Raise DataError for characters that no tokenizer can take, or that minitrain uses itself."""
    text = "".join(texts)
    if OPEN in text or CLOSE in text or LITERAL in text:
        raise DataError(
            "the text has U+E0F0, U+E0F1 or U+E0F2, characters of private use that mark parts of it here",
            "invalid-text",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has {text[error.start]!r}, half of a surrogate pair, which is not a character", "invalid-text"
        ) from None


def _literal(token: str) -> str:
    """Return a special token with a mark after its first character, so that no template and no tokenizer reads it."""
    return token[:1] + LITERAL + token[1:]
