"""Truncation: what goes, what stays, and that no example without labels passes unsaid."""

import pytest

from minitrain.data.encode import TruncationConfig, truncate
from minitrain.data.loader import load_data
from minitrain.data.template import Tokens
from minitrain.errors import DataError
from tests.messages import raises

BOS = 1


def tokens(text: str) -> Tokens:
    """One token a letter: small letters are prompt, capitals are learned, `^` is BOS. A feature has the ids, too."""
    ids = [BOS if c == "^" else ord(c) for c in text]
    return Tokens(ids, [c.isupper() for c in text], token_features={"ids": [float(i) for i in ids]})


def text(tokens: Tokens) -> str:
    """Small letters are not learned, whatever they were before."""
    letters = ("^" if i == BOS else chr(i) for i in tokens.ids)
    return "".join(c if learned else c.lower() for c, learned in zip(letters, tokens.mask))


@pytest.mark.parametrize(
    ("whole", "length", "how", "expected"),
    [
        ("abcdEFG", 7, "prompt", "abcdEFG"),
        ("abcdEFG", 5, "prompt", "cdEFG"),
        ("abcdEFG", 4, "prompt", "dEFG"),
        ("abcdEFG", 3, "prompt", "dEF"),
        ("abcdEFG", 2, "prompt", "dE"),
        ("^bcdEFG", 5, "prompt", "^dEFG"),
        ("^bcdEFG", 4, "prompt", "^EFG"),
        ("^bcdEFG", 3, "prompt", "^EF"),
        ("^EFG", 3, "prompt", "^EF"),
        ("aEFG", 3, "prompt", "aEF"),
        ("abCDefGH", 5, "prompt", "defGH"),
        ("abCDefGH", 7, "prompt", "bCDefGH"),
        ("abcdEFG", 5, "end", "abcdE"),
        ("abcdEFG", 4, "end", None),
        ("abCDefGH", 5, "end", "abCDe"),
        ("abcdEFG", 6, "drop", None),
        ("abcdEFG", 7, "drop", "abcdEFG"),
        ("abcd", 9, "prompt", None),
    ],
)
def test_truncate(whole, length, how, expected):
    """The prompt goes first and the answer stays; a row without labels is left out (trl#6668)."""
    kept = truncate([tokens(whole)], TruncationConfig(length, how), BOS)
    if expected is None:
        assert kept == ("too-long" if how == "drop" and len(whole) > length else "no-target-left")
    else:
        (cut,) = kept
        assert text(cut) == expected
        assert not cut.mask[0] and any(cut.mask) and len(cut.ids) <= length
        assert cut.token_features["ids"] == cut.ids  # so are the weights of tokens
        assert cut.counts == ({"truncated": 1} if len(whole) > length else {})


def test_long_prompts_never_empty_an_answer():
    """However long the prompt and however short the answer, something is left to learn (trl#3382)."""
    for n_prompt in range(1, 30):
        for n_answer in range(1, 6):
            for head in ("", "^"):
                for length in range(2, 20):
                    whole = tokens(head + "p" * n_prompt + "A" * n_answer)
                    (cut,) = truncate([whole], TruncationConfig(length), BOS)
                    assert sum(cut.mask) == min(n_answer, length - 1)


@pytest.mark.parametrize(("how", "code"), [("drop", "too-long"), ("end", "no-target-left")])
def test_dropped_examples_are_counted(jsonl, config, template, wording, how, code):
    """Examples left out are counted and said; when all are, it is an error (trl#6668)."""
    config.max_length, config.truncation = 40, how
    long = {"prompt": "x" * 50, "response": "y"}
    entry = jsonl([long, {"prompt": "x", "response": "y"}, long])
    config.datasets = [entry]
    data = load_data(config, template)
    assert len(data.train) == 1 and data.train.caches[0].counts == {code: 2}
    assert "2 " in data.summary[0] and " 3 (66.7%)" in data.summary[0]
    wording(data.summary[0])
    config.datasets = [jsonl([long], "all.jsonl")]
    for _ in range(2):  # also when the cache is there already
        with raises(DataError, "no-data", "all.jsonl: ", "1 "):
            load_data(config, template)


def test_truncated_examples_are_counted(jsonl, config, template, wording):
    """Cut examples are counted and said, and keep their answer and its end."""
    config.max_length = 24
    config.datasets = [jsonl([{"prompt": "x" * 50, "response": "yes"}])]
    data = load_data(config, template)
    assert data.train.caches[0].counts == {"truncated": 1}
    wording(data.summary[0])
    (cut,) = data.train[0]
    assert template.tokenizer.decode(cut.ids[cut.mask.bool()]) == "yes<|im_end|>" and len(cut.ids) == 24
