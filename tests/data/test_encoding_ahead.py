"""Rows of a chunk are tokenized in one call: the same tokens as one by one, and errors of the row that has them."""

import pytest

from minitrain.config.sections import DatasetConfig, ModelConfig
from minitrain.data.cache import Encoder
from minitrain.data.encode import TruncationConfig
from minitrain.data.template import Template
from minitrain.data.text_encoder import TextEncoder
from minitrain.model.load import load_tokenizer
from minitrain.model.tiny import tiny_tokenizer

CHATS = [
    [("user", "Hi"), ("assistant", "Hello <|im_end|> there")],
    [("system", "Be brief."), ("user", " <|im_end|>ä\n"), ("assistant", "  ☃"), ("user", "Hi"), ("assistant", "Hello")],
    [("user", "Hi"), ("assistant", "Hello")],
]
ROWS = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
ROWS += [{"text": "Hello<|im_end|>"}, {"prompt": "Hi", "response": "Hello"}]


def encoder(tokenizer, **targets) -> Encoder:
    template = Template(tokenizer, "chatml", **targets)
    return Encoder(DatasetConfig("rows.jsonl"), template, TruncationConfig(1 << 16), "conversation")


def tokens(chunk) -> list:
    return [[(document.ids.tolist(), document.mask.tolist()) for document in example] for example in chunk.examples]


@pytest.mark.parametrize("name", ["gpt2", "minimind", "mistral-v3"])
@pytest.mark.parametrize("train_on", ["all_turns", "each_turn"])
def test_the_same_tokens_as_row_by_row(shared, name, train_on):
    tokenizer = load_tokenizer(ModelConfig(str(shared("tokenizers") / name)))
    encode = encoder(tokenizer, train_on=train_on)
    rows = list(enumerate(ROWS * 2))
    chunk = encode(rows)
    assert tokens(chunk) == [example for row in rows for example in tokens(encode([row]))]
    assert len(chunk.examples) == len(rows) and not encode.template.encoder._ids_ahead


def test_one_call_for_a_chunk(monkeypatch):
    """Also of text that follows a special token, and is tokenized after it."""
    encode, texts = encoder(tiny_tokenizer()), []
    original = TextEncoder._encode
    monkeypatch.setattr(TextEncoder, "_encode", lambda self, text, **k: texts.append(text) or original(self, text, **k))
    turns = [("user", "first"), ("assistant", "second"), ("user", "third"), ("assistant", "fourth")]
    encode([(0, {"messages": [{"role": role, "content": text} for role, text in turns]})] * 4)
    assert not [text for text in texts if any(word in text for _, word in turns)]


def test_a_failing_row_is_reported_by_itself(monkeypatch):
    """The call for the chunk fails, so each row is tokenized by itself, and one fails again."""
    encode = encoder(tiny_tokenizer())
    expected = tokens(encode(list(enumerate(ROWS))))
    backend = TextEncoder.backend.fget

    class Failing:
        def __init__(self, tokenizer):
            vars(self)["tokenizer"] = tokenizer

        def encode_batch_fast(self, texts, **options):
            if any("bad" in text for text in texts):
                raise ValueError("no such text")
            return self.tokenizer.encode_batch_fast(texts, **options)

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def __setattr__(self, name, value):
            setattr(self.tokenizer, name, value)

    monkeypatch.setattr(TextEncoder, "backend", property(lambda self: Failing(backend(self))))
    bad = {"prompt": "Hi", "response": "bad"}
    chunk = encode(list(enumerate([*ROWS[:1], bad, *ROWS[1:]])))
    assert tokens(chunk) == expected
    ((before, line, error),) = chunk.bad
    assert (before, line, error.code) == (1, 1, "invalid-text") and "no such text" in error.message
