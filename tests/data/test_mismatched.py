"""KTO's second answers: always one to another prompt, whatever the order of the rows and the files they are in."""

import numpy as np
import pytest
import torch

from minitrain.data.loader import load_data
from minitrain.data.mismatched import choose_partners
from minitrain.errors import DataError
from tests.messages import raises

ORDERS = {
    "by prompt": [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2],
    "in turns": [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2],
    "one prompt has most rows": [0] * 9 + [1, 2],
    "one other prompt": [5, 5, 5, 5, 1],
    "all different": [4, 1, 3, 0, 2],
}


@pytest.mark.parametrize("order", ORDERS)
def test_partners_have_another_prompt(order):
    """No example is paired with its own prompt; with prompts of equally many rows each is chosen once."""
    prompts = np.array(ORDERS[order], float)
    partners = choose_partners(prompts)
    assert (prompts[partners] != prompts).all()
    if len(set(np.unique(prompts, return_counts=True)[1])) == 1:
        assert sorted(partners) == list(range(len(prompts)))
    if order == "all different":
        assert partners.tolist() == [1, 2, 3, 4, 0]


def test_partners_of_random_prompts():
    """The same for 200 random assignments; None for one prompt alone."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompts = rng.integers(0, rng.integers(2, 9), rng.integers(2, 40)).astype(float)
        partners = choose_partners(prompts)
        assert (partners is None) == (len(set(prompts)) == 1)
        assert partners is None or (prompts[partners] != prompts).all()
    assert choose_partners(np.array([3.0])) is None


def row(prompt: str, answer: str) -> dict:
    return {"prompt": prompt, "completion": answer, "label": len(answer) % 2 == 0}


def texts(document, template) -> tuple[str, str]:
    """(prompt, answer) of a document."""
    learned = document.mask.bool()
    return template.tokenizer.decode(document.ids[~learned]), template.tokenizer.decode(document.ids[learned])


def pairs(examples, template) -> list[tuple[str, str, str]]:
    """(prompt, judged answer, other answer) of each example, whose documents have the same prompt."""
    found = []
    for i in range(len(examples)):
        judged, other = examples[i]
        prompt, answer = texts(judged, template)
        assert texts(other, template)[0] == prompt and other.shared == int(judged.mask.argmax())
        assert judged.doc_features == other.doc_features == {"desirable": judged.doc_features["desirable"]}
        found.append((prompt, answer, texts(other, template)[1]))
    return found


def test_rows_grouped_by_prompt(jsonl, config, template):
    """300 rows, more than are tokenized at a time, grouped by prompt: the other answer names another prompt, and the
    judged one its own (trl#1911). In 0.1.0 it was the next row's, so 3 of 4 rows got an answer to their own prompt."""
    config.datasets = [jsonl([row(f"ask {i // 4}", f"to {i // 4}: {'ab' * (1 + i % 3)}") for i in range(300)])]
    data = load_data(config, template, "unpaired_preference").train
    assert len(data) == 300 and data.caches[0].lines.tolist() == list(range(1, 301))
    for prompt, judged, other in pairs(data, template):
        number = prompt.split("ask ")[1].split("<")[0].strip()
        assert judged.startswith(f"to {number}:") and not other.startswith(f"to {number}:")


def test_files_are_taken_together(jsonl, config, template):
    """Each of two files has one prompt, one of them a single row: they get each other's answers."""
    files = [jsonl([row("ask", f"tell {i}") for i in range(3)], "a.jsonl"), jsonl([row("why", "so")], "b.jsonl")]
    config.datasets = files
    data = load_data(config, template, "unpaired_preference").train
    found = [(judged[:4], other[:4]) for _, judged, other in pairs(data, template)]
    assert found == [("tell", "so<|"), ("tell", "so<|"), ("tell", "so<|"), ("so<|", "tell")]
    assert [cache.source for cache in data.caches] == [file.path for file in files]
    config.datasets = files[:1]
    with raises(DataError, "unsuitable-data", "a.jsonl:1: "):
        load_data(config, template, "unpaired_preference")
    config.datasets, config.eval_datasets = files, files[1:]
    with raises(DataError, "unsuitable-data", "b.jsonl:1: "):
        load_data(config, template, "unpaired_preference")


def test_a_prompt_is_the_same_however_its_rows_are_cut(jsonl, config, template):
    """Long answers take tokens off the front of their prompts: it is still one prompt, and nothing is too long."""
    config.max_length = 60
    rows = [row("a long question indeed", "x" * n) for n in (2, 20, 30, 90)] + [row("why", "so long " * 9)]
    config.datasets = [jsonl(rows)]
    data = load_data(config, template, "unpaired_preference").train
    for i in range(5):
        judged, other = data[i]
        assert max(len(judged.ids), len(other.ids)) <= 60 and other.mask.any()
        own = "so" if i == 4 else "x"
        assert not template.tokenizer.decode(other.ids[other.mask.bool()]).startswith(own)
        prompt = int(judged.mask.argmax())
        assert torch.equal(judged.ids[:prompt], other.ids[:prompt])


def test_they_are_kept_and_made_anew(jsonl, config, template):
    """The second start finds the same files; another file among the data, or another length, makes others."""
    entries = [jsonl([row(f"ask {i}", f"tell {i}") for i in range(4)]), jsonl([row("why", "so")], "b.jsonl")]
    config.datasets = entries[:1]

    def keys() -> list[str]:
        return [cache.key for cache in load_data(config, template, "unpaired_preference").train.caches]

    first = keys()
    assert keys() == first
    config.datasets = entries
    assert not set(first) & set(keys())
    config.datasets, config.max_length = entries[:1], 50
    assert keys() != first
