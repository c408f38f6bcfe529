"""Data that cannot be trained on: file, line and reason, before the model is read."""

import gzip
import json
from pathlib import Path

import pytest

from tests.conftest import GOOD_ROW, write


@pytest.mark.parametrize(
    "rows, told",
    [
        ([], "bad.jsonl: no example can be trained on (the file has no rows)"),
        ([GOOD_ROW, b"{"], "bad.jsonl:2: not valid JSON"),
        ([GOOD_ROW, b"", b"3"], "bad.jsonl:3: expected an object with keys"),
        ([b'{"prompt": "\xff"}'], "bad.jsonl:1: not UTF-8 text"),
        ([{"foo": 1}], "bad.jsonl:1: no known schema of conversation rows has the keys foo"),
        ([GOOD_ROW, {"prompt": "a"}], "bad.jsonl:2: no known schema of conversation rows has the keys prompt"),
        ([GOOD_ROW, {"prompt": "a", "response": ""}], "bad.jsonl:2: response is empty"),
        ([{"prompt": "a", "response": [1]}], "bad.jsonl:1: response is not a text"),
        ([{"messages": "hi"}], "bad.jsonl:1: messages is not a list of turns"),
        ([{"messages": [{"role": "boss", "content": "x"}]}], "bad.jsonl:1: messages[0] has the role 'boss'"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "bad.jsonl:1: messages has no turn of the assistant"),
        ([{"messages": [{"role": "user"}]}], "bad.jsonl:1: messages[0] has no text as its content, but 'None'"),
        ([{"messages": []}], "bad.jsonl:1: messages is not a list of turns"),
        ([{"messages": {"role": "user"}}], "bad.jsonl:1: messages is not a list of turns"),
        ([{"prompt": "a", "response": None}], "bad.jsonl:1: response is not a text, but 'None'"),
        ([{"prompt": "a", "response": True}], "bad.jsonl:1: response is not a text, but 'True'"),
        ([{"prompt": float("nan"), "response": "a"}], "bad.jsonl:1: prompt is not a text, but 'nan'"),
        ([{"prompt": "a", "response": float("-inf")}], "bad.jsonl:1: response is not a text, but '-inf'"),
        ([{"text": ""}], "bad.jsonl:1: text is empty"),
        ([{"prompt": "\ud800", "response": "a"}], "bad.jsonl:1: the text holds '\\ud800', half a surrogate pair"),
        ([{"prompt": "\ue0f0", "response": "a"}], "bad.jsonl:1: the text holds U+E0F0 or U+E0F1"),
        (
            [{"Prompt": "a", "Response": "b"}],
            "schema of conversation rows has the keys Prompt, Response. Known are (",
        ),
        ([{"instruction": "a", "output": "b", "history": 3}], "bad.jsonl:1: history is not a list of pairs, but '3'"),
        ([{"chosen": "a", "rejected": "b", "margin": 10**400}], "bad.jsonl:1: margin is not a number, but '1000"),
        (
            [{"question": "a\ud800", "documents": [{"type": "oracle", "text": "b"}], "answer": "c"}],
            "bad.jsonl:1: the text holds '\\ud800', half a surrogate pair",
        ),
        ([{"question": [1], "documents": [{"type": "oracle", "text": "b"}], "answer": "c"}], "question is not a text"),
        ([b'{"prompt": "a", "response": "b", "prompt": "c"}'], "not usable JSON: the key 'prompt' is there twice"),
        ([b'{"prompt": "a", "response": ' + b"[" * 900 + b"]" * 900 + b"}"], "bad.jsonl:1: "),
        ([b"[" * 100_000], "bad.jsonl:1: not usable JSON: maximum recursion depth exceeded"),
        ([b'{"prompt": ' + b"1" * 5000 + b"}"], "bad.jsonl:1: not usable JSON: Exceeds the limit"),
        (
            [json.dumps([GOOD_ROW] * 2).encode()],
            "got list \"[{'prompt': 'a', 'response': 'b'}, {'prompt'",
        ),
        ([json.dumps([GOOD_ROW]).encode()], "; a list of rows belongs in a .json file"),
    ],
)
def test_bad_data(fails, monkeypatch, rows, told):
    """File, line and reason, and the model was not read for it."""
    monkeypatch.setattr("minitrain.trainer.load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    assert told in fails(write("bad.jsonl", *rows))


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("a.json", b"", "a.json: expected a list of rows, "),
        ("a.json", b"3", "a.json: expected a list of rows, "),
        ("a.json", b"[]", "a.json: no example can be trained on (the file has no rows)"),
        ("a.json", b'[{"prompt": "a", ', "a.json:1: not valid JSON: "),
        ("a.json", b"[] x", "a.json:1: not valid JSON: there is more behind the list"),
        ("a.json", b'{"prompt": "a"}', "a.json: expected a list of rows under `data`, found the keys prompt"),
        ("a.json", b'[{"prompt": "a", "prompt": "b"}]', "a.json:1: not valid JSON: the key 'prompt' is there twice"),
        ("a.json", b'{"data": [], "data": []}', "a.json:1: not valid JSON: the key 'data' is there twice"),
        ("a.csv", b"", "a.csv: no example can be trained on (the file has no rows)"),
        ("a.csv", b"prompt,response\n", "a.csv: no example can be trained on (the file has no rows)"),
        ("a.csv", b"prompt,response\na,b\na,b,c\n", "a.csv:3: 3 fields where the header has 2"),
        ("a.csv", b"prompt,response\na\n", "a.csv:2: 1 fields where the header has 2"),
        ("a.csv", b'prompt,response\n"a,b\n', "a.csv:2: not valid CSV: unexpected end of data"),
        ("a.csv", b"prompt;response\na;b\n", "has the keys prompt;response."),
        ("a.csv", b"what,it\na,b\n", "The keys are the first line of the file, which has to be a header"),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv:1: a column name stands twice in the header: prompt, prompt."),
        ("a.csv", b"prompt,response\ncaf\xe9,b\n", "a.csv:2: not UTF-8 text"),
        ("a.tsv", b"prompt response\na b\n", "has the keys prompt response."),
        ("a.jsonl", "{}".encode("utf-16"), "a.jsonl:1: not UTF-8 text (byte 0 of the line)"),
        ("a.jsonl.gz", b"hello", "a.jsonl.gz: cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", b"", "a.jsonl.gz: no example can be trained on (the file has no rows)"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "a", "response": "b"}\n', mtime=0)[:-9],
            "a.jsonl.gz: cannot be read: Compressed",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}\n", mtime=0)[:-8] + b"12345678",
            "a.jsonl.gz: cannot be read: CRC check failed",
        ),
    ],
)
def test_a_file_that_is_not_what_its_name_says(fails, name, content, told):
    """Empty, cut off, of another format or another encoding."""
    Path(name).write_bytes(content)
    err = fails(f"datasets=[{name}]")
    assert told in err and len(err.splitlines()) == 1


NAN, INFINITE = float("nan"), float("inf")
ROLLOUT = {"prompt": "a", "response": "b", "reward": 1.0}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    "loss, rows, told",
    [
        ("classify", [{"text": "a", "label": NAN}], "bad.jsonl:1: label is neither a text nor a number, but 'nan'"),
        ("classify", [{"text": "a", "label": None}], "bad.jsonl:1: label is neither a text nor a number"),
        ("classify", [{"text": "a"}], "bad.jsonl:1: no known schema of classification rows has the keys text"),
        ("classify", [{"text": "a", "label": "x"}], "all examples have the label 'x', so there is nothing to tell"),
        ("{name: classify, labels: [x, z]}", [{"text": "a", "label": "y"}], "the label 'y' is not among x, z"),
        ("{name: classify, regression: true}", [{"text": "a", "label": "x"}], "the label 'x' is no number"),
        ("{name: classify, regression: true}", [{"text": "a", "label": INFINITE}], "the label 'inf' is no number"),
        ("dpo", [GOOD_ROW], "bad.jsonl:1: no known schema of preference rows has the keys prompt, response"),
        ("dpo", [PAIR | {"rejected": "b"}], "bad.jsonl:1: chosen and rejected are the same"),
        ("dpo", [PAIR | {"chosen": None}], "bad.jsonl:1: chosen is not a text, but 'None'"),
        ("dpo", [PAIR | {"chosen": ""}], "bad.jsonl:1: chosen does not end with words of the assistant"),
        ("pairwise", [PAIR | {"margin": NAN}], "bad.jsonl:1: margin is not a finite number, but nan"),
        ("pairwise", [PAIR | {"margin": "big"}], "bad.jsonl:1: margin is not a number, but 'big'"),
        ("kto", [GOOD_ROW | {"label": "good"}], "bad.jsonl:1: label is neither true nor false, but 'good'"),
        ("policy", [GOOD_ROW], "bad.jsonl:1: there is neither a reward, nor advantages, nor returns"),
        ("policy", [ROLLOUT], "no prompt has two rollouts, so none can be compared with another"),
        ("policy", [ROLLOUT | {"reward": INFINITE}], "bad.jsonl:1: reward is not a finite number, but inf"),
        ("policy", [ROLLOUT | {"reward": None}], "bad.jsonl:1: reward is not a number, but 'None'"),
        ("policy", [ROLLOUT | {"old_logps": [NAN, 0]}], "bad.jsonl:1: old_logps is not a finite number, but nan"),
        ("policy", [ROLLOUT | {"old_logps": [-1, 0.5]}], "bad.jsonl:1: old_logps holds 0.5, but a log-probability is"),
        (
            "policy",
            [ROLLOUT | {"ref_logps": [3, -1]}],
            "bad.jsonl:1: ref_logps holds 3, but a log-probability is never",
        ),
        ("policy", [ROLLOUT | {"old_logps": [0] * 5}], "old_logps has 5 numbers for the 2 tokens of the response"),
        ("policy", [ROLLOUT, ROLLOUT | {"advantages": 1}], "some rows have advantages and others have not"),
        ("policy", [{"prompt_ids": [1], "response_ids": [9**9], "reward": 1}], "the token id 387420489 is beyond"),
        ("policy", [{"prompt_ids": [-1], "response_ids": [1], "reward": 1}], "prompt_ids is not a list of token ids"),
    ],
)
def test_data_that_a_loss_cannot_learn_from(fails, loss, rows, told):
    """Labels, rewards and preferences that are missing, not finite or say nothing."""
    err = fails(write("bad.jsonl", *rows), f"loss={loss}")
    assert told in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["datasets=[{path: rows.jsonl, type: alpaca}]"], "rows.jsonl:1: type alpaca needs the key 'instruction'"),
        (["datasets=[{path: rows.jsonl, columns: {prompt: q}}]"], "rows.jsonl:1: columns names 'q'"),
        (["datasets=[{path: rows.jsonl, prompt_template: '{x}'}]"], "prompt_template names the column 'x'"),
        (["validation_split=40"], "40 of 40 examples held out leave none to train on"),
        (["max_length=2", "truncation=drop"], "rows.jsonl: no example can be trained on (40 examples left out"),
        (["cache_dir=c.yml/x"], "the tokens cannot be kept there"),
    ],
)
def test_options_that_do_not_fit_the_data(fails, overrides, told):
    """What only the data can tell is told with file and line too."""
    assert told in fails(*overrides)


@pytest.mark.parametrize(
    "template, told",
    [
        ("{% for x %}", "chat_template: not valid Jinja, line 1: expected token 'in'"),
        ("{{ messages | nothing }}", "chat_template: not valid Jinja, line 1: No filter named 'nothing'"),
        ("{{ raise_exception('not today') }}", "rows.jsonl:1: the chat template refuses the conversation: not today"),
        ("{{ nothing.at.all }}", "the chat template refuses the conversation: 'nothing' is undefined"),
        ("{{ messages + 1 }}", "the chat template refuses the conversation: TypeError: can only concatenate list"),
        ("{{ 1 // 0 }}", "the chat template refuses the conversation: ZeroDivisionError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "chat_template: it does not end, or makes much more"),
        ("hello", "rows.jsonl:1: the chat template hides the answer; give chat_template=chatml or"),
    ],
)
def test_a_chat_template_that_is_none(fails, template, told):
    """Not Jinja, or Jinja that fails, or that shows another text than the conversation."""
    Path("t.jinja").write_text(template)
    err = fails("chat_template=t.jinja")
    assert told in err and len(err.splitlines()) == 1
