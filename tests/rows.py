"""Rows of every kind of record, 24 of each, whose texts are of very different lengths; required options of losses."""

import random
from collections.abc import Callable


def _rows(make: Callable[[int, random.Random], dict]) -> list[dict]:
    rng = random.Random(0)
    return [make(i, rng) for i in range(24)]


def _long(rng: random.Random) -> str:
    return "ab" * rng.choice([1, 2, 5, 15])


ROWS = {
    "conversation": _rows(lambda i, rng: {"prompt": f"say {i}", "response": _long(rng)}),
    "preference": _rows(lambda i, rng: {"prompt": f"say {i}", "chosen": _long(rng), "rejected": "b" * (1 + i % 4)}),
    "unpaired_preference": _rows(lambda i, rng: {"prompt": f"say {i}", "completion": _long(rng), "label": i % 3 > 0}),
    "classification": _rows(lambda i, rng: {"text": f"{i} {_long(rng)}", "label": "even" if i % 2 == 0 else "odd"}),
    "solution": _rows(
        lambda i, rng: {
            "prompt": f"say {i}",
            "steps": [_long(rng), "b"] * (1 + i % 2),
            "labels": [1, i % 2] * (1 + i % 2),
        }
    ),
    "retrieval": _rows(
        lambda i, rng: {"query": f"say {i}", "positive": f"{i} {_long(rng)}", "negatives": [f"{i} b", "c"][: i % 3]}
    ),
    "ranking": _rows(
        lambda i, rng: {"query": f"say {i}", "positive": _long(rng), "negatives": ["b", "c"][: 1 + i % 2]}
    ),
    "prompt": _rows(lambda i, rng: {"prompt": f"say {i}", "answer": _long(rng)}),
    "rollout": _rows(lambda i, rng: {"prompt": f"say {i // 4}", "response": _long(rng) * (1 + i % 3), "reward": i % 4}),
}

REQUIRED = {"kd": {"teacher": "tiny"}}  # options that a loss cannot do without, by the name of the loss
