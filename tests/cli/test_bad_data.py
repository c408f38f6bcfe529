"""Data that cannot be trained on: file, line and reason, before the model is read."""

import gzip
import json
from pathlib import Path

import pytest

from tests.conftest import GOOD_ROW, write
from tests.messages import reports


@pytest.mark.parametrize(
    "rows, code, about",
    [
        ([], "no-data", "bad.jsonl:"),
        ([GOOD_ROW, b"{"], "invalid-json", "bad.jsonl:2:"),
        ([GOOD_ROW, b"", b"3"], "invalid-row", "bad.jsonl:3:"),
        ([b'{"prompt": "\xff"}'], "invalid-text", "bad.jsonl:1:"),
        ([{"foo": 1}], "invalid-row", "bad.jsonl:1:"),
        ([GOOD_ROW, {"prompt": "a"}], "invalid-row", "bad.jsonl:2:"),
        ([GOOD_ROW, {"prompt": "a", "response": ""}], "no-answer", "bad.jsonl:2: response"),
        ([{"prompt": "a", "response": [1]}], "invalid-row", "bad.jsonl:1: response"),
        ([{"messages": "hi"}], "invalid-row", "bad.jsonl:1: messages"),
        ([{"messages": [{"role": "boss", "content": "x"}]}], "invalid-row", "bad.jsonl:1: messages[0]"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "no-answer", "bad.jsonl:1: messages"),
        ([{"messages": [{"role": "user"}]}], "invalid-row", "bad.jsonl:1: messages[0]"),
        ([{"messages": []}], "invalid-row", "bad.jsonl:1: messages"),
        ([{"messages": {"role": "user"}}], "invalid-row", "bad.jsonl:1: messages"),
        ([{"prompt": "a", "response": None}], "invalid-row", "bad.jsonl:1: response"),
        ([{"prompt": "a", "response": True}], "invalid-row", "bad.jsonl:1: response"),
        ([{"prompt": float("nan"), "response": "a"}], "invalid-row", "bad.jsonl:1: prompt"),
        ([{"prompt": "a", "response": float("-inf")}], "invalid-row", "bad.jsonl:1: response"),
        ([{"text": ""}], "invalid-row", "bad.jsonl:1: text"),
        ([{"prompt": "\ud800", "response": "a"}], "invalid-text", "bad.jsonl:1:"),
        ([{"prompt": "\ue0f0", "response": "a"}], "invalid-text", "bad.jsonl:1:"),
        (
            [{"Prompt": "a", "Response": "b"}],
            "invalid-row",
            "",
        ),
        ([{"instruction": "a", "output": "b", "history": 3}], "invalid-row", "bad.jsonl:1: history"),
        ([{"chosen": "a", "rejected": "b", "margin": 10**400}], "invalid-row", "bad.jsonl:1: margin"),
        (
            [{"question": "a\ud800", "documents": [{"type": "oracle", "text": "b"}], "answer": "c"}],
            "invalid-text",
            "bad.jsonl:1:",
        ),
        ([{"question": [1], "documents": [{"type": "oracle", "text": "b"}], "answer": "c"}], "invalid-row", ""),
        ([b'{"prompt": "a", "response": "b", "prompt": "c"}'], "invalid-json", "'prompt'"),
        ([b'{"prompt": "a", "response": ' + b"[" * 900 + b"]" * 900 + b"}"], "invalid-row", "bad.jsonl:1:"),
        ([b"[" * 100_000], "invalid-json", "bad.jsonl:1:"),
        ([b'{"prompt": ' + b"1" * 5000 + b"}"], "invalid-json", "bad.jsonl:1:"),
        (
            [json.dumps([GOOD_ROW] * 2).encode()],
            "invalid-row",
            "'prompt'",
        ),
        ([json.dumps([GOOD_ROW]).encode()], "invalid-row", ""),
    ],
)
def test_bad_data(fails, monkeypatch, rows, code, about):
    """File, line and reason, and the model was not read for it."""
    monkeypatch.setattr("minitrain.training.setup.build_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    assert reports(fails(write("bad.jsonl", *rows)), code, about)


@pytest.mark.parametrize(
    "name, content, code, about",
    [
        ("a.json", b"", "invalid-row", "a.json:"),
        ("a.json", b"3", "invalid-row", "a.json:"),
        ("a.json", b"[]", "no-data", "a.json:"),
        ("a.json", b'[{"prompt": "a", ', "invalid-json", "a.json:1:"),
        ("a.json", b"[] x", "invalid-json", "a.json:1:"),
        ("a.json", b'{"prompt": "a"}', "invalid-row", "a.json:"),
        ("a.json", b'[{"prompt": "a", "prompt": "b"}]', "invalid-json", "a.json:1:"),
        ("a.json", b'{"data": [], "data": []}', "invalid-json", "a.json:1:"),
        ("a.csv", b"", "no-data", "a.csv:"),
        ("a.csv", b"prompt,response\n", "no-data", "a.csv:"),
        ("a.csv", b"prompt,response\na,b\na,b,c\n", "invalid-row", "a.csv:3:"),
        ("a.csv", b"prompt,response\na\n", "invalid-row", "a.csv:2:"),
        ("a.csv", b'prompt,response\n"a,b\n', "invalid-table", "a.csv:2:"),
        ("a.csv", b"prompt;response\na;b\n", "invalid-row", ""),
        ("a.csv", b"what,it\na,b\n", "invalid-row", ""),
        ("a.csv", b"prompt,prompt\na,b\n", "invalid-table", "a.csv:1:"),
        ("a.csv", b"prompt,response\ncaf\xe9,b\n", "invalid-text", "a.csv:2:"),
        ("a.tsv", b"prompt response\na b\n", "invalid-row", ""),
        ("a.jsonl", "{}".encode("utf-16"), "invalid-text", "a.jsonl:1:"),
        ("a.jsonl.gz", b"hello", "unreadable", "a.jsonl.gz:"),
        ("a.jsonl.gz", b"", "no-data", "a.jsonl.gz:"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "a", "response": "b"}\n', mtime=0)[:-9],
            "unreadable",
            "a.jsonl.gz:",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}\n", mtime=0)[:-8] + b"12345678",
            "unreadable",
            "a.jsonl.gz:",
        ),
    ],
)
def test_a_file_that_is_not_what_its_name_says(fails, name, content, code, about):
    """Empty, cut off, of another format or another encoding."""
    Path(name).write_bytes(content)
    err = fails(f"datasets=[{name}]")
    assert reports(err, code, about) and len(err.splitlines()) == 1


NAN, INFINITE = float("nan"), float("inf")
ROLLOUT = {"prompt": "a", "response": "b", "reward": 1.0}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SOLUTION = {"prompt": "a", "steps": ["b", "c"], "labels": [True, False]}


@pytest.mark.parametrize(
    "loss, rows, code, about",
    [
        ("classify", [{"text": "a", "label": NAN}], "invalid-row", "bad.jsonl:1: label"),
        ("classify", [{"text": "a", "label": None}], "invalid-row", "bad.jsonl:1: label"),
        ("classify", [{"text": "a"}], "invalid-row", "bad.jsonl:1:"),
        ("classify", [{"text": "a", "label": "x"}], "unsuitable-data", "'x'"),
        ("{name: classify, labels: [x, z]}", [{"text": "a", "label": "y"}], "mismatch", "'y'"),
        ("{name: classify, regression: true}", [{"text": "a", "label": "x"}], "invalid-row", "'x'"),
        ("{name: classify, regression: true}", [{"text": "a", "label": INFINITE}], "invalid-row", "'inf'"),
        ("dpo", [GOOD_ROW], "invalid-row", "bad.jsonl:1:"),
        ("dpo", [PAIR | {"rejected": "b"}], "same-answers", "bad.jsonl:1:"),
        ("dpo", [PAIR | {"chosen": None}], "invalid-row", "bad.jsonl:1: chosen"),
        ("dpo", [PAIR | {"chosen": ""}], "no-answer", "bad.jsonl:1: chosen"),
        ("pairwise", [PAIR | {"margin": NAN}], "invalid-row", "bad.jsonl:1: margin"),
        ("pairwise", [PAIR | {"margin": "big"}], "invalid-row", "bad.jsonl:1: margin"),
        ("kto", [GOOD_ROW | {"label": "good"}], "invalid-row", "bad.jsonl:1: label"),
        ("policy", [GOOD_ROW], "invalid-row", "bad.jsonl:1:"),
        ("policy", [ROLLOUT], "unsuitable-data", ""),
        ("policy", [ROLLOUT | {"reward": INFINITE}], "invalid-row", "bad.jsonl:1: reward"),
        ("policy", [ROLLOUT | {"reward": None}], "invalid-row", "bad.jsonl:1: reward"),
        ("policy", [ROLLOUT | {"old_logps": [NAN, 0]}], "invalid-row", "bad.jsonl:1: old_logps"),
        ("policy", [ROLLOUT | {"old_logps": [-1, 0.5]}], "invalid-row", "bad.jsonl:1: old_logps"),
        (
            "policy",
            [ROLLOUT | {"ref_logps": [3, -1]}],
            "invalid-row",
            "bad.jsonl:1: ref_logps",
        ),
        ("policy", [ROLLOUT | {"old_logps": [0] * 5}], "invalid-row", "old_logps"),
        ("policy", [ROLLOUT, ROLLOUT | {"advantages": 1}], "mismatch", ""),
        ("policy", [{"prompt_ids": [1], "response_ids": [9**9], "reward": 1}], "invalid-row", ""),
        ("policy", [{"prompt_ids": [-1], "response_ids": [1], "reward": 1}], "invalid-row", "prompt_ids"),
        ("classify", [{"text": "a", "label": ["x"]}, {"text": "b", "label": "y"}], "unsuitable-data", '["x"]'),
        (
            "{name: classify, multi_label: true}",
            [{"text": "a", "labels": [["x"]]}],
            "invalid-row",
            "bad.jsonl:1: labels",
        ),
        ("process", [SOLUTION | {"steps": "a"}], "invalid-row", "bad.jsonl:1: steps"),
        ("process", [SOLUTION | {"labels": [True]}], "invalid-row", "bad.jsonl:1: labels"),
        ("process", [SOLUTION | {"labels": [True, 2]}], "invalid-row", "bad.jsonl:1: labels"),
        ("process", [SOLUTION | {"labels": [True, "so"]}], "invalid-row", "bad.jsonl:1: labels"),
        ("embed", [{"query": "a", "positive": "b", "negatives": "c"}], "invalid-row", "bad.jsonl:1: negatives"),
        ("embed", [{"query": "a", "positive": ""}], "invalid-row", "bad.jsonl:1:"),
        ("rerank", [{"query": "a", "positive": "b"}], "invalid-row", "bad.jsonl:1: negatives"),
    ],
)
def test_data_that_a_loss_cannot_learn_from(fails, loss, rows, code, about):
    """Labels, rewards and preferences that are missing, not finite or say nothing."""
    err = fails(write("bad.jsonl", *rows), f"loss={loss}")
    assert reports(err, code, about) and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "overrides, code, about",
    [
        (["datasets=[{path: rows.jsonl, type: alpaca}]"], "invalid-row", "rows.jsonl:1:"),
        (["datasets=[{path: rows.jsonl, columns: {prompt: q}}]"], "wrong-column", "rows.jsonl:1:"),
        (["datasets=[{path: rows.jsonl, prompt_template: '{x}'}]"], "wrong-column", "'x'"),
        (["validation_split=40"], "no-data", ""),
        (["max_length=2", "truncation=drop"], "no-data", "rows.jsonl:"),
        (["cache_dir=c.yml/x"], "not-writable", ""),
    ],
)
def test_options_that_do_not_fit_the_data(fails, overrides, code, about):
    """What only the data can tell is told with file and line too."""
    assert reports(fails(*overrides), code, about)


@pytest.mark.parametrize(
    "template, code, about",
    [
        ("{% for x %}", "invalid-template", "chat_template:"),
        ("{{ messages | nothing }}", "invalid-template", "chat_template:"),
        ("{{ raise_exception('not today') }}", "invalid-template", "rows.jsonl:1:"),
        ("{{ nothing.at.all }}", "invalid-template", "'nothing'"),
        ("{{ messages + 1 }}", "invalid-template", ""),
        ("{{ 1 // 0 }}", "invalid-template", ""),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "invalid-template", "chat_template:"),
        ("hello", "invalid-template", "rows.jsonl:1:"),
    ],
)
def test_a_chat_template_that_is_none(fails, template, code, about):
    """Not Jinja, or Jinja that fails, or that shows another text than the conversation."""
    Path("t.jinja").write_text(template)
    err = fails("chat_template=t.jinja")
    assert reports(err, code, about) and len(err.splitlines()) == 1
