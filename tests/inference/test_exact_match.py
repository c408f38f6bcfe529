"""The final answer in a text: what `eval_generate.match` compares."""

import json
from fractions import Fraction

import pytest

from minitrain import ConfigError, load_config
from minitrain.data.template import Template
from minitrain.inference.evaluation import final_answer, prompt_texts
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import SHARED
from tests.messages import raises

SAME = [
    ("so she has 18.\n#### 18", "18"),
    ("#### 1,080", "1080"),
    ("#### $1,080.00", "1080"),
    ("#### 109,200,000", "109200000"),
    ("#### -3", "-3"),
    ("#### −3", "-3"),
    ("#### 0.50", "1/2"),
    ("#### 18 eggs\nQuestion: and 5 more?", "18"),
    ("#### **18**", "18"),
    ("#### 3\n#### 18", "18"),
    (r"first \boxed{3}, then $\boxed{18.0}$, 5 in all", "18"),
    (r"\boxed{1{,}000}", "1000"),
    (r"\boxed{18.}", "18"),
    (r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{2}}"),
    ("48/2 = <<48/2=24>>24, altogether 48+24 = 72.", "72"),
    ("It costs $1,234.50.", "1234.5"),
    ("The answer is: 20%", "20"),
    ("\\$5", "5"),
    ("She lost 7: the balance is -$7", "-7"),
    ("from 10-15", "15"),
    ("in short:\n- 18", "18"),
    ("a half, .5", "0.5"),
    ("2e3", "2000"),
    ("1, 2, 3", "3"),
]


@pytest.mark.parametrize(("text", "number"), SAME)
def test_numbers_that_are_the_same(text, number):
    """Wherever they stand and however they are written."""
    found = final_answer(text, "number")
    assert found is not None and found == final_answer(number, "number")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "81"),
        ("#### none\n5", "5"),
        ("18 of 20", "18"),
        ("#### 3/4", "3"),
        (r"\boxed{\sqrt{2}}", "2"),
        ("- 18", "-18"),
        ("8", ".8"),
    ],
)
def test_numbers_that_are_not(text, number):
    """Digits alone do not make them so."""
    assert final_answer(text, "number") != final_answer(number, "number")


@pytest.mark.parametrize("text", ["", "I do not know", "####", "#### ", r"\boxed{18"[:7]])
def test_no_number(text):
    """Where there is none, nothing is compared, so that two such answers are not the same one."""
    assert final_answer(text, "number") is None


def test_numbers_that_nobody_can_read():
    """1/0 and ten thousand digits, which a model may well write, end no evaluation."""
    assert final_answer("#### 1/0", "number") == "1/0"
    assert final_answer("9" * 10_000, "number") == "9" * 10_000
    assert final_answer("1e999999999", "number") != final_answer("1", "number")  # and does not take all memory


@pytest.mark.parametrize("split", ["train", "test"])
def test_real_answers(split):
    """Every reference of GSM8K gives the number behind its last ####, with and without what stands before it."""
    file = SHARED / "data" / "gsm8k" / f"{split}.jsonl"
    if not file.exists():
        pytest.skip("no real data here")
    for line in file.read_text().splitlines():
        answer = json.loads(line)["answer"]
        number = Fraction(answer.rpartition("#### ")[2].replace(",", ""))
        assert final_answer(answer, "number") == final_answer(f"It is ${number}.", "number") == number


def test_text_and_expressions():
    """The whole answer but for white space around it; the group of the last match, numbers by what they are worth."""
    assert final_answer(" 18 \n", "text") == "18" != final_answer("18.0", "text")
    assert final_answer("Answer: no. Answer: yes", r"Answer: (\w+)") == "yes"
    assert final_answer("A = 1,000.0;", r"A = (.*);") == final_answer("A = $1000;", r"A = (.*);")
    assert final_answer("no such thing", r"Answer: (\w+)") is None


@pytest.mark.parametrize("match", ["nmber", "(a)(b)", "a(", ""])
def test_expressions_that_are_refused(match, rows_file, wording):
    """Anything but text, number and an expression with one group, with the nearest word."""
    base = {"datasets": [str(rows_file)], "eval_datasets": [str(rows_file)], "model": {"name_or_path": "tiny"}}
    with raises(ConfigError, "invalid-value", "eval_generate.match: ") as told:
        load_config(base | {"eval_generate": {"n_examples": 2, "match": match}})
    wording(told.value)


@pytest.mark.parametrize(
    ("chat_template", "messages", "shown"),
    [
        ("chatml", ["2 + 2 = <b>\n"], "2 + 2 = <b>\n"),
        ("none", ["2 + 2 ="], "2 + 2 ="),
        ("chatml", ["a", "b", "c"], "a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc"),
    ],
)
def test_a_prompt_is_shown_as_the_user_wrote_it(chat_template, messages, shown):
    """Without what the template adds before and after; a conversation has its special tokens."""
    template = Template(tiny_tokenizer(), chat_template)
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    assert prompt_texts([template.encode_prompt(turns)] * 2, template) == [shown] * 2
    system = [{"role": "system", "content": "s"}, *turns]
    (with_system,) = prompt_texts([template.encode_prompt(system)], template)
    assert with_system.endswith(messages[-1] if chat_template == "none" else "<|im_start|>assistant\n")


def test_what_is_logged(make_trainer, rows_file, tmp_path, monkeypatch, capsys):
    """exact_match counts the answers whose numbers are right, and shows the number that was expected."""
    from minitrain.inference.generate import Generator, Response

    answers = ["so 7 and 2 is 9", "#### 12", "none\ufffd", "1,000."]
    responses = [Response(answer, {"role": "assistant", "content": answer}) for answer in answers]
    rows = [{"prompt": "?", "response": f"it is so\n#### {n}"} for n in ("9", "13", "4", "1000")]
    rows[2]["response"] = "nothing"  # there is no number in it, nor in the answer
    file = tmp_path / "eval.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(Generator, "generate_from_ids", lambda *_, **__: responses)
    wanted = ["eval_generate.n_examples=4", "eval_generate.match=number", f"eval_datasets=[{file}]", "n_steps=1"]
    trainer = make_trainer(*wanted)
    ended = trainer.train()
    assert ended["exact_match"] == 0.5
    out, err = capsys.readouterr()
    warning = "warning: 1 of 4 references have no final answer by eval_generate.match=number, so their answers count as"
    assert f"{warning} wrong: {file}:3\n" in out + err
    samples = [json.loads(line) for line in (trainer.run.path / "samples.jsonl").read_text().splitlines()]
    shown = {"step": 1, "prompt": "?", "answer": "#### 12", "expected": "13", "right": False}
    assert len(samples) == 6 and samples[4] == shown  # three at the start, three at the end
    for line in ("'#### 12' (wrong, expected '13')", "'none?' (wrong, the reference has no final answer)"):
        assert f"  '?' -> {line}\n" in out


def test_a_reference_of_zero(make_trainer, tmp_path, monkeypatch, capsys):
    """0 is a final answer: it is compared, shown and written as every other, and no reference is reported missing."""
    from minitrain.inference.generate import Generator, Response

    responses = [Response(answer, {"role": "assistant", "content": answer}) for answer in ("#### 0", "#### 7")]
    file = tmp_path / "eval.jsonl"
    file.write_text(
        json.dumps({"prompt": "?", "response": "#### 0.0"}) + "\n" + json.dumps({"prompt": "!", "response": "0"})
    )
    monkeypatch.setattr(Generator, "generate_from_ids", lambda *_, **__: responses)
    trainer = make_trainer(
        "eval_generate.n_examples=2", "eval_generate.match=number", f"eval_datasets=[{file}]", "n_steps=1"
    )
    assert trainer.train()["exact_match"] == 0.5
    samples = [json.loads(line) for line in (trainer.run.path / "samples.jsonl").read_text().splitlines()]
    assert [(one["expected"], one["right"]) for one in samples[-2:]] == [("0", True), ("0", False)]
    out, err = capsys.readouterr()
    assert "  '!' -> '#### 7' (wrong, expected '0')\n" in out and "no final answer" not in out + err
