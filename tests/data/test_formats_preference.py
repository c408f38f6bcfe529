"""Preferences, feedback, labels and rollouts: from rows to documents."""

import math
from dataclasses import replace

import pytest
import torch

from minitrain.config.sections import DatasetConfig
from minitrain.data.encode import TruncationConfig, encode
from minitrain.data.examples import (
    ClassificationExample,
    Conversation,
    Preference,
    Rollout,
    UnpairedPreference,
    row_formats_of,
    to_example,
)
from minitrain.data.files import read_rows
from minitrain.data.loader import load_data
from minitrain.data.template import Template
from minitrain.errors import DataError
from minitrain.model.tiny import tiny_tokenizer
from tests.messages import raises

ASK = {"role": "user", "content": "ask"}
TELL, LIE = ({"role": "assistant", "content": text} for text in ("tell", "lie"))


def record(row: dict, kind: str, **options):
    return to_example(row, DatasetConfig(path="x.jsonl", **options), kind)


SIDES = {
    "texts": ("tell", "lie"),
    "turns": (TELL, LIE),
    "from and value": ({"from": "gpt", "value": "tell"}, {"from": "gpt", "value": "lie"}),
    "lists": ([TELL], [LIE]),
    "lists with the prompt": ([ASK, TELL], [ASK, LIE]),
}
PROMPTS = {
    "prompt": {"prompt": "ask"},
    "messages as prompt": {"prompt": [ASK]},
    "conversations": {"conversations": [{"from": "human", "value": "ask"}]},
    "question": {"question": "ask"},
    "instruction": {"instruction": "ask", "input": ""},
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("sides", SIDES)
def test_shapes_of_preferences(prompt, sides):
    """Every way to write the prompt and every way to write the answers give one record."""
    chosen, rejected = SIDES[sides]
    row = PROMPTS[prompt] | {"chosen": chosen, "rejected": rejected}
    assert record(row, "preference") == Preference([ASK], [TELL], [LIE])


def test_the_prompt_that_both_sides_begin_with():
    """Without a column of its own, the prompt is what both continuations have in common."""
    for key in ("chosen", "chosen_messages"):
        row = {key: [ASK, TELL, ASK, TELL], key.replace("chosen", "rejected"): [ASK, TELL, ASK, LIE]}
        assert record(row, "preference") == Preference([ASK, TELL, ASK], [TELL], [LIE])
    later = record({"chosen": [ASK, TELL, ASK, LIE], "rejected": [ASK, LIE]}, "preference")
    assert later == Preference([ASK], [TELL, ASK, LIE], [LIE])


def test_transcripts():
    """Texts of several turns as in Anthropic's HH data; what both begin with is the prompt."""
    start = "\n\nHuman: ask\n\nAssistant: tell: Human\nis\n\nHuman: ask"
    row = {"chosen": f"{start}\n\nAssistant: tell", "rejected": f"{start}\n\nAssistant: lie"}
    said = {"role": "assistant", "content": "tell: Human\nis"}
    assert record(row, "preference") == Preference([ASK, said, ASK], [TELL], [LIE])
    with raises(DataError, "no-answer", "chosen"):
        record(row | {"chosen": f"{start}\n\nAssistant: "}, "preference")


def test_a_prompt_beside_whole_conversations():
    """`messages` may be the prompt with the chosen answer, beside a `prompt`, as in UltraFeedback's files."""
    row = {"prompt": "ask", "chosen": [ASK, TELL], "rejected": [ASK, LIE], "messages": [ASK, TELL]}
    assert record(row, "preference") == Preference([ASK], [TELL], [LIE])


def test_margin_and_system():
    """A margin column, and a system turn beside the prompt."""
    made = record({"system": "s", "prompt": "ask", "chosen": "tell", "rejected": "lie", "margin": 2}, "preference")
    assert made == Preference([{"role": "system", "content": "s"}, ASK], [TELL], [LIE], 2.0)


@pytest.mark.parametrize("label, wanted", [(True, True), (0, False), ("True", True), (" false", False)])
def test_feedback(label, wanted):
    """All four shapes that feedback comes in."""
    for row in (
        {"prompt": "ask", "completion": "tell", "label": label},
        {"prompt": [ASK], "response": [TELL], "label": label},
        {"messages": [ASK, TELL], "label": label},
        {"conversations": [ASK, TELL], "kto_tag": label},
    ):
        assert record(row, "unpaired_preference") == UnpairedPreference([ASK], [TELL], wanted)


def test_labelled():
    """Columns by the names that GLUE has, or by `columns`; a label of any kind is kept as text."""
    assert record({"text": "a", "label": 1}, "classification") == ClassificationExample("a", None, "1")
    assert record({"sentence": "a", "label": 0.5}, "classification") == ClassificationExample("a", None, "0.5")
    for first, second in (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")):
        assert record({first: "a", second: "b", "label": "yes"}, "classification") == ClassificationExample(
            "a", "b", "yes"
        )
    columns = {"text": "#1 String", "text_pair": "#2 String", "label": "Quality"}
    row = {"Quality": "1", "#1 String": "a", "#2 String": "b"}
    assert record(row, "classification", columns=columns) == ClassificationExample("a", "b", "1")


def test_rollouts():
    """Texts, messages or token ids; rewards, and numbers for each token."""
    assert record({"prompt": "ask", "response": "tell", "reward": 1}, "rollout") == Rollout([ASK], "tell", 1.0)
    assert record({"messages": [ASK], "response": "tell", "reward": 1}, "rollout") == Rollout([ASK], "tell", 1.0)
    row = {"prompt_ids": [3, 4], "response_ids": [5], "advantages": 0.5, "old_logps": [-1]}
    unrewarded = record(row, "rollout")
    assert math.isnan(unrewarded.reward)
    assert replace(unrewarded, reward=0) == Rollout([3, 4], [5], 0, {"old_logps": [-1.0], "advantages": [0.5]})


@pytest.mark.parametrize(
    "kind, row, code, part",
    [
        (
            "preference",
            {"prompt": "a", "response": "b"},
            "invalid-row",
            "columns: {chosen: ",
        ),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "same-answers", ""),
        ("preference", {"prompt": "a", "chosen": "", "rejected": "b"}, "no-answer", "chosen"),
        ("preference", {"prompt": "a", "chosen": "c", "rejected": [ASK]}, "no-answer", "rejected"),
        ("preference", {"prompt": "a", "chosen": 1.0, "rejected": None}, "invalid-row", "rejected"),
        ("preference", {"prompt": "a", "chosen": "c", "rejected": "b", "margin": "x"}, "invalid-row", "margin"),
        ("unpaired_preference", {"prompt": "a", "completion": "b", "label": "maybe"}, "invalid-row", "label"),
        ("unpaired_preference", {"prompt": "a", "completion": "b", "label": [1]}, "invalid-row", "label"),
        ("unpaired_preference", {"messages": [ASK], "label": True}, "no-answer", "messages"),
        ("classification", {"text": "a", "label": None}, "invalid-row", "label"),
        ("classification", {"text": "a", "label": ""}, "invalid-row", "label"),
        ("classification", {"text": None, "label": 1}, "invalid-row", "text"),
        ("rollout", {"prompt": "a", "response": "b"}, "invalid-row", "reward"),
        ("rollout", {"prompt": "a", "response": "", "reward": 1}, "no-answer", "response"),
        ("rollout", {"prompt": "a", "response": "b", "reward": float("nan")}, "invalid-row", "reward"),
        ("rollout", {"prompt_ids": [], "response_ids": [1], "reward": 1}, "invalid-row", "prompt_ids"),
        ("rollout", {"prompt_ids": [1.5], "response_ids": [1], "reward": 1}, "invalid-row", "prompt_ids"),
    ],
)
def test_bad_rows(kind, row, code, part, wording):
    """A row that cannot be used says which part of it, and why."""
    with raises(DataError, code, part) as caught:
        record(row, kind)
    wording(caught.value)


@pytest.fixture
def byte_template() -> Template:
    """One token a byte, and no template around the texts."""
    return Template(tiny_tokenizer(), "none")


WIDE = TruncationConfig(100)


def documents(made, template, limits=WIDE):
    return encode(made, template, limits)


def shown(document, template) -> str:
    """The text, the learned part in capitals."""
    pieces = zip(document.ids, document.mask)
    return "".join(template.tokenizer.decode([i]).upper() if m else template.tokenizer.decode([i]) for i, m in pieces)


def test_documents_of_a_preference(byte_template):
    """Chosen, then rejected: only the answers are learned, and the prompt is known to be the same."""
    chosen, rejected = documents(Preference([ASK], [TELL], [LIE], 0.5), byte_template)
    assert shown(chosen, byte_template).startswith("askTELL") and shown(rejected, byte_template).startswith("askLIE")
    assert (chosen.shared, rejected.shared) == (0, 3)
    assert chosen.doc_features == rejected.doc_features == {"margin": 0.5}


def test_prompts_are_cut_alike(byte_template):
    """A long prompt loses the same tokens on both sides, and each side keeps its answer (trl#3382, trl#6548)."""
    prompt = [{"role": "user", "content": "abcdefghij"}]
    answers = [{"role": "assistant", "content": "tell"}], [{"role": "assistant", "content": "x"}]
    whole = documents(Preference(prompt, *answers), byte_template)
    n_end = len(whole[0].ids) - 14  # of the token that ends an answer
    for limits, kept in (
        (TruncationConfig(9 + n_end), "fghij"),
        (TruncationConfig(100, "prompt", 3), "hij"),
        (TruncationConfig(9 + n_end, "end", 4), "ghij"),
        (TruncationConfig(5 + n_end), "j"),
        (TruncationConfig(3), "j"),
    ):
        chosen, rejected = documents(Preference(prompt, *answers), byte_template, limits)
        prompts = ["".join(c for c in shown(d, byte_template) if c.islower()) for d in (chosen, rejected)]
        assert prompts == [kept, kept] and any(chosen.mask) and any(rejected.mask)
        assert max(len(chosen.ids), len(rejected.ids)) <= limits.max_length and rejected.shared == len(kept)
    made = Preference(prompt, *answers)
    assert documents(made, byte_template, TruncationConfig(9, "drop")) == "too-long"
    assert documents(made, byte_template, TruncationConfig(10, "end")) == "no-target-left"


def test_pairs_with_the_same_answer_twice(byte_template, template):
    """Two answers that a template strips to the same one are refused; those that truncation makes the same are left
    out, and counted. 0.1.0 took both, with a gradient of 0 and an accuracy that counts as wrong."""
    spaced = {"role": "assistant", "content": "tell "}
    template.tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content | trim + eos_token }}{% endfor %}"
    stripping = Template(template.tokenizer, "auto")
    with raises(DataError, "same-answers"):
        documents(Preference([ASK], [TELL], [spaced]), stripping)
    longer = {"role": "assistant", "content": "tell me"}
    made = Preference([ASK], [TELL], [longer])
    assert documents(made, byte_template, TruncationConfig(7, "end")) == "same-answers"
    assert isinstance(documents(made, byte_template, TruncationConfig(9, "end")), list)


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_answers_are_refused_wherever_they_are_learned(byte_template, content):
    """One rule: alone, in the middle, at the end of a conversation, in a preference and in feedback. Where an answer is
    only part of the prompt, it may be empty."""
    empty = {"role": "assistant", "content": content}
    for made in (
        Conversation([ASK, empty]),
        Conversation([ASK, empty, ASK, TELL]),
        Conversation([ASK, TELL, ASK, empty]),
        Preference([ASK], [empty, ASK, TELL], [LIE]),
        Preference([ASK], [TELL], [empty]),
        UnpairedPreference([ASK], [empty], True),
    ):
        with raises(DataError, "no-answer", "turn "):
            documents(made, byte_template)
    last = Template(tiny_tokenizer(), "none", "last_turn")
    for made, template in (
        (Conversation([ASK, empty, ASK, TELL]), last),
        (Preference([ASK, empty, ASK], [TELL], [LIE]), byte_template),
        (UnpairedPreference([ASK, empty, ASK], [TELL], True), byte_template),
    ):
        assert isinstance(documents(made, template), list)


def test_documents_of_feedback(byte_template):
    """The judged answer alone, with a number that is the same for the same prompt."""
    (judged,) = documents(UnpairedPreference([ASK], [TELL], True), byte_template)
    (same,) = documents(UnpairedPreference([ASK], [LIE], False), byte_template, TruncationConfig(4, "prompt"))
    (other,) = documents(UnpairedPreference([ASK, TELL, ASK], [TELL], True), byte_template)
    assert shown(judged, byte_template).startswith("askTELL") and judged.doc_features["desirable"] == 1.0
    assert judged.doc_features["prompt"] == same.doc_features["prompt"] != other.doc_features["prompt"]


def test_documents_of_labels(byte_template, shared):
    """Nothing is learned word by word; a pair has the separators and the types of a BERT tokenizer."""
    (alone,) = documents(ClassificationExample("ask", None, "yes"), byte_template)
    assert not any(alone.mask) and alone.doc_features == {"label": "yes"}
    from transformers import AutoTokenizer

    bert = AutoTokenizer.from_pretrained(shared("tokenizers/bert-base-uncased"))
    template = Template(bert, "none")
    for limits in (TruncationConfig(100), TruncationConfig(6)):
        (pair,) = documents(ClassificationExample("one two three", "four", "0"), template, limits)
        want = bert("one two three", "four", truncation=True, max_length=limits.max_length)
        assert pair.ids == want["input_ids"] and pair.token_features["token_types"] == want["token_type_ids"]


def test_documents_of_rollouts(byte_template):
    """Numbers stand at the tokens of the response; those of a wrong count are refused. What is too long, or was cut off
    in sampling, is whole, and marked as not to be trained on."""
    made = Rollout([5, 6], [7, 8, 9], 2.0, {"old_logps": [-1.0, -2.0, -3.0], "advantages": [0.5]})
    (document,) = documents(made, byte_template)
    assert document.ids == [5, 6, 7, 8, 9] and document.mask == [False, False, True, True, True]
    assert document.token_features == {"old_logps": [0, 0, -1, -2, -3], "advantages": [0, 0, 0.5, 0.5, 0.5]}
    end = byte_template.tokenizer.eos_token_id
    for response, truncated, limits, excluded in (
        ([7, 8, 9], None, TruncationConfig(4), True),
        ([7, 8, 9], None, TruncationConfig(5), False),
        ([7, 8, 9], None, TruncationConfig(5, mask_truncated=True), True),
        ([7, 8, end], None, TruncationConfig(5, mask_truncated=True), False),
        ([7, 8, 9], False, TruncationConfig(5, mask_truncated=True), False),
        ([7, 8, end], True, TruncationConfig(5, mask_truncated=True), True),
        ([7, 8, end], True, TruncationConfig(5), False),
    ):
        (found,) = documents(Rollout([5, 6], response, 1.0, truncated=truncated), byte_template, limits)
        assert found.ids == [5, 6, *response] and found.doc_features["excluded"] == excluded == bool(found.counts)
    ended, cut = (documents(Rollout([ASK], "tell", 1.0, {}, cut), byte_template)[0] for cut in (None, True))
    assert ended.ids == [*cut.ids, end] and all(cut.mask[-4:])
    with raises(DataError, "invalid-row", "old_logps", "prompt_ids and response_ids"):
        documents(Rollout([ASK], "tell", 1.0, {"old_logps": [-1.0]}), byte_template)
    with raises(DataError, "invalid-row", "100000"):
        documents(Rollout([100000], [1], 1.0), byte_template)
    same, other = (documents(Rollout(p, [7], 1.0), byte_template)[0].doc_features["group"] for p in ([5, 6], [5, 7]))
    assert same == document.doc_features["group"] != other


def test_through_the_cache(jsonl, config, template):
    """Values, columns and shared prompts come back from the cache; labels by name."""
    rows = [{"prompt": f"ask {i}", "chosen": "yes", "rejected": "no", "margin": i} for i in range(5)]
    config.datasets = [jsonl(rows)]
    data = load_data(config, template, "preference").train
    chosen, rejected = data[3]
    assert chosen.doc_features == {"margin": 3.0} and rejected.shared == int(rejected.mask.argmax())
    assert data.lengths[3] == len(chosen.ids) + len(rejected.ids) - rejected.shared
    config.datasets = [jsonl([{"text": f"t{i}", "label": ["no", "yes"][i % 2]} for i in range(5)], "labels.jsonl")]
    (cache,) = load_data(config, template, "classification").train.caches
    assert cache.labels == ["no", "yes"] and cache.doc_features["label"].tolist() == [0, 1, 0, 1, 0]
    row = {"prompt_ids": [3], "response_ids": [4, 5], "reward": 1, "old_logps": [-1, -2]}
    config.datasets = [jsonl([row, row], "rollouts.jsonl")]
    (document,) = load_data(config, template, "rollout").train[1]
    assert document.doc_features["reward"] == 1 and torch.equal(
        document.token_features["old_logps"], torch.tensor([0.0, -1, -2])
    )
    config.datasets = [jsonl([row, row | {"old_logps": None}], "uneven.jsonl")]
    with raises(DataError, "mismatch", "uneven.jsonl: ", "old_logps"):
        load_data(config, template, "rollout")


@pytest.mark.parametrize("name, n", [("dpo_en_demo.json", 300), ("v1_dpo_demo.jsonl", 10)])
def test_real_preferences(shared, name, n, template):
    """Every row of real preference data becomes two documents whose learned parts differ and whose prompts do not."""
    rows = [row for _, row in read_rows(shared("data/llamafactory") / name)]
    assert len(rows) == n
    for row in rows[:40]:
        chosen, rejected = documents(record(row, "preference"), template, TruncationConfig(512))
        first, second = chosen.mask.index(True), rejected.mask.index(True)
        assert chosen.ids[:first] == rejected.ids[:second] and rejected.shared == first
        assert chosen.ids[first:] != rejected.ids[second:] and any(chosen.mask) and any(rejected.mask)


def test_every_kind_has_a_schema():
    """None of the kinds that losses ask for is empty."""
    assert all(
        row_formats_of(kind)
        for kind in ("conversation", "preference", "unpaired_preference", "classification", "rollout")
    )
