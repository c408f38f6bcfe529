"""Special tokens in data: ordinary text in the turns of users and tools, in training and at inference."""

import pytest

from minitrain.data.examples import Conversation
from minitrain.data.template import Template
from minitrain.model.tiny import tiny_tokenizer
from tests import small_templates as small
from tests.chat_templates import turn
from tests.data.test_families import answer, make_template, user

TOKENIZERS = ["tokenizers/gpt2", "tokenizers/mistral-v3", "tokenizers/minimind", "models/stories260K"]
CHOICES = [("tiny", "auto"), *[(name, kind) for name in TOKENIZERS for kind in ("auto", "chatml", "none")]]
CONTENTS = ["a {} b", "{}", "x{}{}y", "\u4f60{}", "line\n{}\nline"]


@pytest.fixture
def load(shared):
    def get(name: str, kind: str, **options) -> Template:
        from transformers import AutoTokenizer

        if name == "tiny":
            return Template(tiny_tokenizer(), kind, **options)
        tokenizer = AutoTokenizer.from_pretrained(shared(name))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return Template(tokenizer, kind, **options)

    return get


def special_tokens(template: Template) -> list[str]:
    """EOS, and up to three others."""
    tokens = [str(token) for token in template.tokenizer.added_tokens_decoder.values() if token.special]
    return [*dict.fromkeys([template.tokenizer.eos_token, *tokens])][:4]


def encode(template: Template, content: str):
    return template.encode(Conversation([user(content), answer("ok")]))


@pytest.mark.parametrize(("name", "kind"), CHOICES)
def test_special_tokens_of_a_user_are_text(load, name, kind):
    """No id of theirs is added, the text is the same, it is counted, and the prompt is that of inference."""
    template = load(name, kind)
    for token in special_tokens(template):
        number = template.tokenizer.convert_tokens_to_ids(token)
        for content in CONTENTS:
            tokens, plain = encode(template, content.format(*[token] * 2)), encode(template, content.replace("{}", "."))
            assert tokens.ids.count(number) == plain.ids.count(number)
            assert content.format(*[token] * 2) in template.tokenizer.decode(tokens.ids)
            assert tokens.counts == {"literal-tokens": content.count("{}")} and plain.counts == {}
            prompt = template.encode_prompt([user(content.format(*[token] * 2))])
            assert tokens.ids[: len(prompt)] == prompt and tokens.mask.index(True) == len(prompt)
            n = sum(plain.mask)
            assert tokens.ids[-n:] == plain.ids[-n:] and tokens.mask[-n:] == plain.mask[-n:]


@pytest.mark.parametrize(("name", "kind"), CHOICES)
def test_special_tokens_as_such(load, name, kind):
    """split_special_tokens=false reads them as the tokenizer does."""
    template = load(name, kind, split_special_tokens=False)
    for token in special_tokens(template):
        number = template.tokenizer.convert_tokens_to_ids(token)
        tokens, plain = encode(template, f"a {token} b"), encode(template, "a . b")
        assert tokens.ids.count(number) == plain.ids.count(number) + 1 and tokens.counts == {}


def test_turns_whose_special_tokens_are_text():
    """Those of users and tools; what the system and the assistant say is of who made the data."""
    for role, n in {"system": 1, "user": 0, "tool": 0, "assistant": 1}.items():
        template = make_template(small.QWEN3)
        messages = [user("q"), answer("a"), turn(role, "x<|call|>y"), answer("ok")]
        tokens = template.encode(Conversation(messages))
        assert tokens.ids.count(template.tokenizer.convert_tokens_to_ids("<|call|>")) == n
        assert tokens.counts.get("literal-tokens", 0) == 1 - n


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn"])
@pytest.mark.parametrize("name", ["tiny", *TOKENIZERS])
def test_reasoning_that_is_not_trained_on(load, name, train_on):
    """Its tokens alone are not targets; the ids are the same."""
    reasoning = "First I add one and two, which is three."
    messages = [user("q"), answer("a", reasoning_content=reasoning), user("<|im_end|>"), answer("b", weight=0.5)]
    messages[-1]["reasoning_content"] = reasoning.upper()
    full, masked = (
        load(name, "chatml", train_on=train_on, train_on_reasoning=train_on_reasoning).encode(Conversation(messages))
        for train_on_reasoning in (True, False)
    )
    assert masked.ids == full.ids and len(masked.mask) == len(full.ids)
    template = load(name, "chatml")
    removed = [token for token, before, after in zip(full.ids, full.mask, masked.mask) if before and not after]
    text = template.tokenizer.decode(removed)
    expected = reasoning.upper() if train_on == "last_turn" else reasoning + reasoning.upper()
    assert text.replace(" ", "") == expected.replace(" ", "")
    assert all(before or not after for before, after in zip(full.mask, masked.mask))
