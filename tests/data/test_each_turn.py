"""train_on=each_turn: each answer is learned as inference gives it, in documents that share their beginning."""

import random

import pytest

from minitrain.batch import TARGET_WEIGHTS
from minitrain.config.sections import DatasetConfig
from minitrain.data import rendering
from minitrain.data.encode import TruncationConfig, encode
from minitrain.data.examples import Conversation
from minitrain.data.loader import MicrobatchLoader, load_data
from minitrain.data.messages import parse_messages
from minitrain.data.sandbox import render
from minitrain.data.shared_prefixes import merge_prefixes, n_shared, share_prefixes
from minitrain.data.template import Template
from minitrain.data.text_encoder import Tokens
from minitrain.model.tiny import tiny_tokenizer
from tests.chats import THINKING, conversation, conversations, separate, targets, written
from tests.data.test_template import BARE_CHATML, MISTRAL

# History and response have the beginning of a thought in common.
EMPTY_THOUGHTS = THINKING.replace(
    "{% endif %}{{ m['content']",
    "{% elif m['role'] == 'assistant' %}{{ '<think>\\n</think>\\n\\n' }}{% endif %}{{ m['content']",
)
TEMPLATES = {"thinking": THINKING, "empty thoughts": EMPTY_THOUGHTS, "bare": BARE_CHATML, "mistral": MISTRAL}
WEIGHTS = (0, 0.5, 1, 2)


def make(chat_template: str, train_on: str = "each_turn") -> Template:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    return Template(tokenizer, "auto", train_on, on_missing="warn")


def documents(row: dict, template: Template, limits: TruncationConfig) -> list[Tokens]:
    found = encode(Conversation(parse_messages(row["messages"], "messages")), template, limits)
    return [] if isinstance(found, str) else found


@pytest.mark.parametrize("truncation", ["prompt", "end", "drop"])
@pytest.mark.parametrize("max_length", [1000, 150, 100, 60])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learned_is_that_of_separate_rows(name, max_length, truncation):
    """Each token after the same context and with the same weight as in a row that ends with its answer, whatever is
    truncated."""
    limits = TruncationConfig(max_length, truncation)
    rows = conversations(weights=WEIGHTS)
    if name == "mistral":
        rows = [{"messages": [{"role": "system", "content": "S" * 30}, *row["messages"]]} for row in rows]
        separated = [
            {"messages": [rows[0]["messages"][0], *row["messages"]]} for row in separate(conversations(weights=WEIGHTS))
        ]
    else:
        separated = separate(rows)
    each, last = make(TEMPLATES[name]), make(TEMPLATES[name], "last_turn")
    found = targets(document for row in rows for document in documents(row, each, limits))
    wanted = targets(document for row in separated for document in documents(row, last, limits))
    assert found == wanted and (found or max_length < 100)


@pytest.mark.parametrize("max_length", [1000, 150])
@pytest.mark.parametrize("chat_template", [THINKING, EMPTY_THOUGHTS], ids=["thinking", "empty thoughts"])
def test_documents_share_their_beginning_with_the_owner_before_them(chat_template, max_length):
    """What is left out of a document is what the last one before it that leaves out nothing begins with."""
    n = 0
    for row in conversations():
        owner = None
        for document in documents(row, make(chat_template), TruncationConfig(max_length)):
            if document.shared:
                assert document.ids[: document.shared] == owner.ids[: document.shared]
                assert not any(document.mask[: document.shared])
                n += 1
            else:
                owner = document
    assert n > 3


def test_what_it_saves():
    """Six answers with reasoning: the history is laid out once, not once for each answer; with a template that keeps
    all of it, in a single document."""
    row = conversation(6, random.Random(0))
    limits = TruncationConfig(10_000)
    found = documents(row, make(THINKING), limits)
    separated = [documents(each, make(THINKING, "last_turn"), limits)[0] for each in separate([row])]
    laid_out, n_separate = sum(len(d.ids) - d.shared for d in found), sum(len(d.ids) for d in separated)
    answers = sum(sum(d.mask) for d in separated[:-1])
    assert laid_out == len(separated[-1].ids) + answers
    assert (len(found), laid_out, n_separate) == (6, 546, 1248)
    (document,) = documents(row, make(BARE_CHATML), limits)
    assert document.mask.count(True) == sum(len(f"answer {i}") + 1 for i in range(6))


@pytest.mark.parametrize("n", [10, 40])
def test_the_time_is_not_cubic_in_the_number_of_turns(monkeypatch, n):
    """Each turn takes some renderings, not some for each turn before it."""
    n_rendered = 0

    def counted(*args, **kwargs):
        nonlocal n_rendered
        n_rendered += 1
        return render(*args, **kwargs)

    template, row = make(THINKING), conversation(n, random.Random(0))
    monkeypatch.setattr(rendering, "render", counted)
    assert len(documents(row, template, TruncationConfig(100_000))) == n
    assert n_rendered < 8 * n


def letters(text: str) -> Tokens:
    return Tokens([ord(c) for c in text], [c.isupper() for c in text])


def test_groups_of_documents():
    """A document whose beginning was truncated shares nothing with the others, which share among themselves."""
    cut, *rest = (letters(text) for text in ("cdefG", "abcdX", "abcY", "abZ"))
    found = share_prefixes([cut, *rest])
    assert [(d.ids, d.shared) for d in found] == [
        (cut.ids, 0), (rest[0].ids, 0), (rest[1].ids, 3), (rest[2].ids, 2)
    ]  # fmt: skip
    # With one token in common, such as BOS, they are still laid out after the one that has more.
    owner, *rest = (letters(text) for text in ("^cdefG", "^abcdX", "^abcY", "^abZ"))
    assert [d.shared for d in share_prefixes([owner, *rest])] == [0, 0, 4, 3]
    # A turn that the template moves: all share the history before it with the first one.
    assert [d.shared for d in share_prefixes([letters("abcdeZ"), letters("abcXY"), letters("abcX")])] == [0, 3, 3]


def test_a_beginning_becomes_part_of_a_longer_document():
    """With its targets and weights; a document that is trained on the same tokens stays by itself."""
    longer, shorter, same = letters("abcdE"), letters("aB"), letters("abcdE")
    longer.ids[1] = shorter.ids[1]
    shorter.token_features[TARGET_WEIGHTS] = [0.0, 0.5]
    (document,) = merge_prefixes([shorter, longer])
    assert document.mask == [False, True, False, False, True]
    assert document.token_features[TARGET_WEIGHTS] == [0, 0.5, 0, 0, 1]
    assert merge_prefixes([same, letters("abcdE")]) == [same, same]
    assert n_shared(letters("abC"), letters("abcdE")) == 2


def test_responses_that_are_dropped_are_counted(tmp_path, config):
    """Some answers of a conversation fit and others do not: the count is in the summary."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x" * 90}] * 2
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, *turns]}
    config.datasets = [DatasetConfig(path=str(written(tmp_path / "rows.jsonl", [row])))]
    for truncation, counts in (("drop", {"dropped-responses": 2}), ("prompt", {"truncated": 1})):
        config.max_length, config.truncation = 60, truncation
        data = load_data(config, make(THINKING))
        assert data.train.caches[0].counts == counts and len(data.train) == 1
    assert any(line.partition(": ")[2].startswith("1 ") for line in data.summary)


@pytest.mark.parametrize("shares", [True, False])
def test_rows_are_no_longer_than_their_capacity(tmp_path, config, shares):
    """Packed rows hold what is laid out: without a shared beginning, examples are longer, and fewer fit into a row."""
    config.datasets = [DatasetConfig(path=str(written(tmp_path / "rows.jsonl", conversations(24))))]
    config.packing, config.total_batch_size, config.eval_batch_size = True, 24, 24
    examples = load_data(config, make(THINKING)).train
    loader = MicrobatchLoader(examples, config, 0, row_capacity=700, shares_prompts=shares)
    sizes = [sum(examples.document_sizes(i, shares)) for i in range(24)]
    assert loader.lengths.tolist() == sizes and (max(sizes) > examples.lengths.max()) == (not shares)
    layouts = [*loader.layout(loader.order(0)), *loader.eval_layout()]
    rows = [row for batch_rows in layouts for row in batch_rows]
    assert len(rows) > 2 and max(sum(sizes[i] for i in row) for row in rows) <= 700
    for batch_rows, widths in zip(layouts, loader.widths(layouts)):
        batch = loader.batch(batch_rows)
        assert batch.input_ids.shape == (len(widths), max(widths)) and batch.n_tokens == sum(widths)
        assert batch.n_docs == sum(len(examples[i]) for row in batch_rows for i in row)
