"""The same on real tokenizers: byte-level and sentencepiece ones, with and without BOS, templates and markers."""

import pytest

from minitrain.config.sections import DatasetConfig
from minitrain.data.examples import Conversation, to_example
from minitrain.data.files import read_rows
from minitrain.data.template import Template
from minitrain.errors import DataError

TOKENIZERS = ["tokenizers/gpt2", "tokenizers/mistral-v3", "tokenizers/minimind", "models/stories260K"]
CHOICES = [(name, kind) for name in TOKENIZERS for kind in ("auto", "chatml", "none")]
ANSWERS = ["plain words", " a space first", "two\n\nlines", "\U0001f600 smile", "caf\xe9 \u4f60\u597d", "{{name}}  x"]


@pytest.fixture(scope="module")
def loaded():
    return {}


@pytest.fixture
def load(shared, loaded):
    def get(name: str, kind: str) -> Template:
        from transformers import AutoTokenizer

        if (name, kind) not in loaded:
            tokenizer = AutoTokenizer.from_pretrained(shared(name))
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            loaded[name, kind] = Template(tokenizer, kind)
        return loaded[name, kind]

    return get


def pieces(template: Template, tokens) -> list[tuple[str, bool]]:
    """The text in stretches that are learned or not, each decoded behind what stands before it."""
    decode = template.tokenizer.decode
    ends = [i for i in range(1, len(tokens.ids)) if tokens.mask[i] != tokens.mask[i - 1]]
    texts, before = [], ""
    for end in [*ends, len(tokens.ids)]:
        text = decode(tokens.ids[:end])
        assert text.startswith(before)
        texts.append((text[len(before) :], tokens.mask[end - 1]))
        before = text
    return texts


@pytest.mark.parametrize(("name", "kind"), CHOICES)
def test_masks(load, name, kind):
    """The learned text is the assistant's words and the turn's end, exactly; only a sentencepiece tokenizer's own
    space behind a special token may come before them."""
    template = load(name, kind)
    end = template.tokenizer.convert_ids_to_tokens(template.end_ids()[-1])
    for answer in ANSWERS:
        messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ("ask", answer, "on", answer))]
        tokens = template.encode(Conversation(messages))
        texts = [text for text, learned in pieces(template, tokens) if learned]
        assert len(texts) == 2 and tokens.mask[-1] and tokens.counts == {}
        for text in texts:
            assert text == answer + end or (template.encoder._prepends_space and text == f" {answer}{end}")


@pytest.mark.parametrize(("name", "kind"), CHOICES)
def test_prompt_of_inference(load, name, kind):
    """The prompt's ids are those of training and those transformers gives the rendered prompt; one BOS at most, and
    one where the tokenizer adds it (transformers#31796)."""
    template = load(name, kind)
    tokenizer = template.tokenizer
    messages = [{"role": "user", "content": " Why\n\nis it so?"}]
    prompt = template.encode_prompt(messages)
    tokens = template.encode(Conversation([*messages, {"role": "assistant", "content": "\U0001f600 So."}]))
    assert tokens.ids[: len(prompt)] == prompt and tokens.mask.index(True) == len(prompt)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt in (whole, [tokenizer.bos_token_id, *whole])
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        assert prompt[0] == tokenizer.bos_token_id
        assert tokens.ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", ["auto", "chatml", "none"])
def test_whole_conversations_are_tokenised_as_one(load, kind):
    """Sentencepiece tokenizers: the ids of a whole conversation equal those of its text in one piece."""
    template = load("tokenizers/mistral-v3", kind)
    messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ("ask", "tell me", "on", "yes"))]
    ids = template.encode(Conversation(messages)).ids
    text = template.tokenizer.apply_chat_template(messages, tokenize=False)
    whole = template.tokenizer(text, add_special_tokens=False)["input_ids"]
    start = 0 if whole[0] == ids[0] else 1
    assert ids[start:] == whole[: len(ids) - start]


@pytest.mark.parametrize("name", ["tokenizers/mistral-v3", "tokenizers/minimind"])
def test_tool_use(load, shared, name):
    """Real conversations with calls of tools: encoded with every word of the answers, or refused by the template."""
    template, refused = load(name, "auto"), 0
    for _, row in list(read_rows(shared("data/llamafactory/glaive_toolcall_en_demo.json")))[:40]:
        record = to_example(row, DatasetConfig(path="x"))
        try:
            tokens = template.encode(record)
        except DataError as error:
            assert error.code in ("invalid-template", "lost-field")
            refused += 1
            continue
        decoded = template.tokenizer.decode([i for i, flag in zip(tokens.ids, tokens.mask) if flag])
        last = [message for message in record.messages if message["role"] == "assistant"][-1]
        assert last["content"].strip() in decoded
        assert all(call["function"]["name"] in decoded for call in last.get("tool_calls", ()))
    assert refused < 40


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_do_not_depend_on_what_is_learned(load, name):
    """train_on changes the mask only, also where an answer's first letters could merge with what stands before it."""
    template = load(name, "chatml")
    messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, ("ask", "\n\nwell", "on", "\n x"))]
    whole = template.encode(Conversation(messages))
    template.targets = template.targets._replace(train_on="last_turn")
    last = template.encode(Conversation(messages))
    template.targets = template.targets._replace(train_on="all_turns")
    assert whole.ids == last.ids and 0 < sum(last.mask) < sum(whole.mask)
