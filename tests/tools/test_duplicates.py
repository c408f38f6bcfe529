"""Examples that occur twice, and evaluation examples that are in the training data: exact numbers and lines."""

import dataclasses
import json

import numpy as np
import pytest

from minitrain.config.schema import Config
from minitrain.config.sections import DatasetConfig, ModelConfig
from minitrain.data.loader import load_data
from minitrain.data.template import Template
from minitrain.model.tiny import tiny_tokenizer
from minitrain.tools.preflight import duplicates
from minitrain.tools.preflight.duplicates import describe_duplicates, hash_examples

TURNS = [{"role": ("user", "assistant")[i % 2], "content": f"{i}"} for i in range(6)]


def pair(prompt: str, response: str) -> dict:
    return {"prompt": prompt, "response": response}


@pytest.fixture
def describe(tmp_path):
    """``describe(rows, eval_rows, kind, ...)``: the report of these rows, without the folder in names."""

    def describe(rows: list, eval_rows: list = (), kind: str = "conversation", **options) -> dict[str, str]:
        entries = []
        for name, part in (("t.jsonl", rows), ("e.jsonl", eval_rows)):
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
            entries.append([DatasetConfig(str(tmp_path / name))] if part else [])
        config = Config(model=ModelConfig("tiny"), cache_dir=str(tmp_path / "cache"), num_proc=1, **options)
        config = dataclasses.replace(config, datasets=entries[0], eval_datasets=entries[1])
        data = load_data(config, Template(tiny_tokenizer(), train_on=config.train_on), kind)
        lines = describe_duplicates(data.train, data.eval, kind)
        return {name: text.replace(f"{tmp_path}/", "") for name, text in lines.items()}

    return describe


def test_examples_that_repeat_an_earlier_one(describe):
    """Each repetition counts; another response, prompt or mask does not."""
    rows = [pair("a", "b"), pair("a", "c"), pair("a", "b"), pair("ab", "x"), pair("a", "b"), pair("a", "c")]
    assert describe(rows) == {
        "duplicates": "3 of 6 training examples repeat an earlier one: "
        "t.jsonl:3 like t.jsonl:1, t.jsonl:5 like t.jsonl:1, t.jsonl:6 like t.jsonl:2"
    }
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    assert describe([{"messages": TURNS}, {"messages": turns}]) == {"duplicates": "none"}  # the same ids
    many = describe([pair("a", "b")] * 5)["duplicates"]
    assert many.startswith("4 of 5 ") and many.endswith("t.jsonl:4 like t.jsonl:1, ...")


def test_evaluation_examples_in_the_training_data(describe):
    """The same example, or the same prompt with another response; a text without a prompt has no prompt in common."""
    rows = [pair("a", "b"), pair("c", "d"), {"text": "abc"}]
    eval_rows = [pair("c", "d"), pair("c", "e"), pair("z", "d"), {"text": "axy"}, pair("a", "b")]
    assert describe(rows, eval_rows) == {
        "duplicates": "none",
        "leaks": "2 of 5 evaluation examples are in the training data: e.jsonl:1 like t.jsonl:2, "
        "e.jsonl:5 like t.jsonl:1",
        "same prompts": "1 other evaluation examples have the prompt of a training example: e.jsonl:2 like t.jsonl:2",
    }
    assert describe(rows, [pair("z", "d")])["leaks"] == "none"
    assert describe(rows, [pair("c", "e")])["leaks"] == "none"


def test_duplicates_on_both_sides_of_a_split_are_leaks(describe):
    """Of 10 pairs of equal rows, each held-out row whose partner is not held out, too."""
    rows = [pair(str(i // 2), "x") for i in range(20)]
    found = describe(rows, validation_split=8)
    n_leaks = int(found["leaks"].split()[0])
    n_repeated = 0 if found["duplicates"] == "none" else int(found["duplicates"].split()[0])
    assert n_leaks > 0 and n_leaks + 2 * n_repeated == 12  # training rows: with a partner there, or held out
    assert " of 8 evaluation examples " in found["leaks"]


def test_examples_of_several_documents(describe):
    """All documents have to be equal, and in the same order."""
    a, b = {"prompt": "p", "chosen": "x", "rejected": "y"}, {"prompt": "p", "chosen": "y", "rejected": "x"}
    c = a | {"rejected": "z"}
    found = describe([a, b, c, a], [c, a | {"chosen": "w"}], "preference")
    assert found["duplicates"] == "1 of 4 training examples repeat an earlier one: t.jsonl:4 like t.jsonl:1"
    assert found["leaks"] == "1 of 2 evaluation examples are in the training data: e.jsonl:1 like t.jsonl:3"
    assert found["same prompts"].endswith(": e.jsonl:2 like t.jsonl:1")
    rows = [{"messages": TURNS[:4]}, {"messages": TURNS}, {"messages": TURNS[:4]}]
    assert describe(rows, train_on="each_turn")["duplicates"].startswith("1 of 3 ")


def test_labeled_responses_and_rollouts(describe):
    """The partner that KTO's KL needs does not count, nor the numbers of a rollout."""
    rows = [{"prompt": p, "completion": f"to {p}", "label": True} for p in "aabc"]  # a and a have b and c as partners
    found = describe(
        rows, [{"prompt": p, "completion": f"to {p}", "label": False} for p in "cz"], "unpaired_preference"
    )
    assert found["duplicates"].startswith("1 of 4 ") and found["leaks"].startswith("1 of 2 ")
    rows = [pair("a", response) | {"reward": i} for i, response in enumerate("bbcb")]
    assert describe(rows, kind="rollout")["duplicates"].startswith("2 of 4 ")


def test_blocks_and_files(describe, monkeypatch):
    """The hashes do not depend on how much is hashed at once."""
    rows = [{"messages": TURNS[: 2 * (i % 3) + 2]} for i in range(7)] + [pair(str(i), "x" * i) for i in range(1, 9)]
    whole = describe(rows, rows[3:5])
    for n_tokens in (1, 50, 200):
        monkeypatch.setattr(duplicates, "BLOCK_TOKENS", n_tokens)
        assert describe(rows, rows[3:5]) == whole
    assert whole["duplicates"].startswith("4 of 15 ") and whole["leaks"].startswith("2 of 2 ")


def test_hashes_are_of_ids_mask_and_borders(describe, monkeypatch):
    """Against a plain comparison of all examples."""
    seen = {}
    monkeypatch.setattr(
        duplicates,
        "hash_examples",
        lambda cache, only: seen.setdefault(id(cache), (cache, hash_examples(cache, only)))[1],
    )
    rows = [{"prompt": a, "chosen": b, "rejected": c} for a in "pq" for b, c in ("xy", "yx", "xz", ["zz", "x"])]
    describe(rows + rows[::-2], kind="preference")
    ((cache, hashes),) = seen.values()
    plain = [str([(d.ids.tolist(), d.mask.tolist()) for d in cache[i]]) for i in range(len(cache))]
    _, want = np.unique(plain, return_inverse=True)
    _, found = np.unique(hashes.examples, return_inverse=True)
    assert [(want == i).tolist() for i in want] == [(found == i).tolist() for i in found]
