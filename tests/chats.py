"""Conversations with reasoning and weights, a template that drops earlier reasoning, and trainers on them."""

import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from minitrain.batch import TARGET_WEIGHTS

# As Qwen3 has it: only the answer to the last turn of the user has its reasoning.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['reasoning_content'] and loop.index0 > ns.last %}"
    "{{ '<think>\\n' + m['reasoning_content'] + '\\n</think>\\n\\n' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def conversation(n_answers: int, rng: random.Random, weights: tuple[float, ...] = (1.0,)) -> dict:
    """A row of so many questions, each with reasoning and an answer, which has a weight."""
    turns = []
    for i in range(n_answers):
        turns.append({"role": "user", "content": f"question {i} " + "ab" * rng.randrange(8)})
        answer = {"role": "assistant", "content": f"answer {i}", "reasoning_content": "hmm " * rng.randrange(1, 6)}
        turns.append(answer | {"weight": rng.choice(weights)})
    turns[-1]["weight"] = weights[-1]
    return {"messages": turns}


def conversations(n: int = 8, weights: tuple[float, ...] = (1.0,)) -> list[dict]:
    """Rows of one to four questions."""
    rng = random.Random(0)
    return [conversation(1 + i % 4, rng, weights) for i in range(n)]


def separate(rows: list[dict]) -> list[dict]:
    """A row for each answer that has a weight, with the turns before it; to be read with train_on=last_turn."""
    made = []
    for row in rows:
        for i, turn in enumerate(row["messages"]):
            if turn["role"] == "assistant" and turn["weight"]:
                made.append({"messages": row["messages"][: i + 1]})
    return made


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def targets(documents: Iterable) -> Counter:
    """How often each token is learned after each context, and with which weight."""
    found: Counter = Counter()
    for document in documents:
        ids, mask = list(map(int, document.ids)), list(map(bool, document.mask))
        weights = document.token_features.get(TARGET_WEIGHTS, mask)
        found.update((tuple(ids[:i]), ids[i], round(float(weights[i]), 6)) for i, learned in enumerate(mask) if learned)
    return found


def first_step(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step."""
    _, batches = next(trainer.train_loader.steps())
    loss = trainer.forward_backward(batches).loss.item()
    return loss, {name: p.grad.clone() for name, p in trainer.policy.named_parameters() if p.grad is not None}


def assert_same(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    assert got[1].keys() == want[1].keys()
    for name, gradient in got[1].items():
        assert (gradient - want[1][name]).norm() <= 2e-6 * want[1][name].norm(), name
