"""Whatever a row has reaches what is trained on: reasoning, calls, and all tokens of both responses of a pair."""

import pytest
from tokenizers import models

from minitrain.data.encode import TruncationConfig, encode
from minitrain.data.examples import Conversation, Preference
from minitrain.data.messages import parse_messages
from minitrain.data.template import Template
from minitrain.errors import DataError
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import byte_tokenizer
from tests.messages import raises

CALL = {"type": "function", "function": {"name": "add", "arguments": {"first": 19, "second": "twenty"}}}
LIMITS = TruncationConfig(10_000)


def answered(**answer) -> Conversation:
    turns = [{"role": "user", "content": "19 + 20?"}, {"role": "assistant", **answer}]
    return Conversation(parse_messages(turns, "messages"))


def learned(template: Template, document) -> str:
    return template.tokenizer.decode([i for i, is_target in zip(document.ids, document.mask) if is_target])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_trained_on(template, key):
    """By any of its names, also beside a call (transformers#44301, minimind#737)."""
    for fields in ({"content": "39"}, {"content": None, "tool_calls": [CALL]}):
        (document,) = encode(answered(**{key: "a sum of two"}, **fields), template, LIMITS)
        assert learned(template, document).startswith("<think>\na sum of two\n</think>\n\n")


def test_reasoning_that_a_template_writes_twice():
    """It is refused: the model would learn to repeat its thoughts (trl#6361)."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['reasoning_content'] %}"
        "{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    conversation = answered(content="39", reasoning_content="a sum of two")
    (document,) = encode(conversation, Template(tokenizer), LIMITS)
    assert learned(Template(tokenizer), document) == "<think>a sum of two</think>39<|im_end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("</think>'", "</think>' + m['reasoning_content']")
    with raises(DataError, "lost-field", "turn 2 of 2", "reasoning"):
        encode(conversation, Template(tokenizer), LIMITS)


@pytest.mark.parametrize("content", ["", None, "I call it."])
@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_calls_are_trained_on(template, key, content):
    """Their names and arguments, not just the token that ends the turn (axolotl#3824)."""
    value = [CALL] if key == "tool_calls" else CALL["function"]
    (document,) = encode(answered(content=content, **{key: value}), template, LIMITS)
    text = learned(template, document)
    assert '{"name": "add", "arguments": {"first": 19, "second": "twenty"}}' in text and text.endswith("<|im_end|>")
    assert (content or "") in text


@pytest.fixture(scope="module")
def merging() -> Template:
    """A tokenizer with tokens of two and four letters."""
    tokenizer = byte_tokenizer()
    vocabulary = tokenizer.get_vocab()
    vocabulary |= {text: len(vocabulary) + i for i, text in enumerate(("ab", "ba", "abab"))}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "a"), ("ab", "ab")])
    return Template(tokenizer, "none")


@pytest.mark.parametrize(("chosen", "rejected"), [("abab", "abba"), ("ab", "abab"), ("abab", "ab"), ("aba", "abb")])
def test_responses_that_part_within_a_token(merging, chosen, rejected):
    """Neither loses a token of the beginning that they have in common, whichever tokens it becomes (trl#6433)."""
    responses = [[{"role": "assistant", "content": content}] for content in (chosen, rejected)]
    documents = encode(Preference([{"role": "user", "content": "abab="}], *responses), merging, LIMITS)
    for document, response in zip(documents, (chosen, rejected), strict=True):
        assert learned(merging, document) == response + "<|end|>"
    assert documents[1].shared == documents[1].mask.index(True) > 0
