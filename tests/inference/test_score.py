"""`minitrain score`: labels and ratings of texts, pairs, answers and files, from every kind of folder."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from minitrain.cli.main import main
from minitrain.data.template import Template
from tests.messages import reports
from tests.scorers import random_base


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with trained models in runs/: labels, lora, numbers, and reward, an adapter over a chat template."""
    place = tmp_path_factory.mktemp("score")
    rows = [{"text": f"{word} {i}", "label": word} for i in range(8) for word in ("yes", "no")]
    files = {"labels": rows, "numbers": [{"text": "a" * i, "label": i} for i in range(9)]}
    files["pairs"] = [{"prompt": f"say {i}", "chosen": "yes " * i, "rejected": "no"} for i in range(1, 9)]
    for name, lines in files.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bert, llama = random_base("bert", place / "bert"), random_base("llama", place / "llama")
    runs = {
        "labels": ("labels", bert, {"name": "classify"}, {}),
        "lora": ("labels", bert, {"name": "classify"}, {"rank": 4}),
        "numbers": ("numbers", llama, {"name": "classify", "regression": True}, {}),
        "reward": ("pairs", llama, {"name": "pairwise"}, {"rank": 4}),
    }
    for name, (data, model, loss, lora) in runs.items():
        config = {"datasets": [str(place / f"{data}.jsonl")], "model": {"name_or_path": str(model)}, "loss": loss}
        config |= {"lora": lora, "n_steps": 4, "total_batch_size": 8, "lr": 1e-2, "max_length": 96}
        config |= {"output_dir": str(place / "runs"), "cache_dir": str(place / "cache"), "exp_name": name}
        (place / f"{name}.yml").write_text(yaml.dump(config))
        assert main(["train", str(place / f"{name}.yml")]) == 0
    return place


def told(capsys, *arguments) -> list[str]:
    """The lines that a command prints."""
    capsys.readouterr()
    assert main(["score", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def test_labels_with_probabilities(place, capsys):
    """Of texts and pairs, as transformers has them from the saved folder; the batch size changes nothing."""
    model = AutoModelForSequenceClassification.from_pretrained(place / "runs" / "labels" / "final").eval()
    words = AutoTokenizer.from_pretrained(place / "runs" / "labels" / "final")
    texts, pairs = ["yes 3", "something else", "no"], ["a", "b c", "a longer one"]
    for halves in (None, pairs):
        more = ["--text-pair", *halves] if halves else []
        found = told(capsys, place / "runs" / "labels", "--text", *texts, *more)
        assert found == told(capsys, place / "runs" / "labels", "--text", *texts, *more, "--batch-size", 1)
        for i, line in enumerate(found):
            logits = model(**words(*([texts[i]] + ([halves[i]] if halves else [])), return_tensors="pt")).logits[0]
            name, probability = line.split("\t")
            assert name == model.config.id2label[int(logits.argmax())]
            assert float(probability) == pytest.approx(logits.softmax(0).max().item(), abs=1e-4)


def test_a_file_with_columns(place, capsys, tmp_path):
    """Rows keep their order and what they hold, and get a prediction; a label in them is not needed and not touched."""
    rows = [("one", "1"), ("two and more", "x"), ("three", "")]
    table, output = tmp_path / "rows.tsv", tmp_path / "out.jsonl"
    table.write_text("#1 String\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    (line,) = told(capsys, place / "runs/labels", "--input", table, "--columns", "text=#1 String", "--output", output)
    assert line == f"3 predictions saved to {output}"
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["#1 String"], row["label"]) for row in found] == rows
    alone = told(capsys, place / "runs" / "labels", "--text", *(a for a, _ in rows))
    assert [f"{row['prediction']}\t{row['probability']:.4f}" for row in found] == alone


def test_a_prediction_that_a_row_has(place, capsys, tmp_path):
    """It is not written over, and the probability keeps its name."""
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.json"
    rows.write_text('{"text": "one", "prediction": 3}\n{"text": "two"}\n')
    (line,) = told(capsys, place / "runs/labels", "--input", rows, "--output", output)
    assert line.endswith("; the rows have a column of that name, so `prediction` is saved as `model_prediction`")
    first, second = json.loads(output.read_text())
    assert first["prediction"] == 3 and {"model_prediction", "probability"} <= first.keys() & second.keys()


def test_an_adapter_a_merged_model_and_the_run_agree(place, capsys, tmp_path):
    """The same lines from each; merged, it is a model of transformers with the labels' names."""
    source, merged = place / "runs" / "lora", tmp_path / "merged"
    found = told(capsys, source, "--text", "yes 1", "no 2")
    assert found == told(capsys, source / "final", "--text", "yes 1", "no 2")
    assert main(["merge", str(source), "--output", str(merged)]) == 0
    assert told(capsys, merged, "--text", "yes 1", "no 2") == found
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    assert model.config.id2label == {0: "no", 1: "yes"}
    shares = ["--weights", "0.25", "0.5", "--output", str(tmp_path / "shares")]
    assert main(["merge", str(source), str(source), *shares]) == 0
    part = AutoModelForSequenceClassification.from_pretrained(tmp_path / "shares")
    for name in ("classifier", "bert.pooler.dense"):  # the base has none, so nothing of its random ones may stay
        whole = model.get_submodule(name).weight
        torch.testing.assert_close(part.get_submodule(name).weight, 0.75 * whole, rtol=1e-5, atol=1e-6)


def test_numbers(place, capsys):
    """Regression gives the number itself, which is that of transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(place / "runs" / "numbers" / "final").eval()
    words = AutoTokenizer.from_pretrained(place / "runs" / "numbers" / "final")
    found = told(capsys, place / "runs" / "numbers", "--text", "aa", "aaaaaaa")
    want = [model(**words(text, return_tensors="pt")).logits.item() for text in ("aa", "aaaaaaa")]
    assert [float(line) for line in found] == pytest.approx(want, abs=1e-4)


def test_ratings_of_answers(place, capsys, tmp_path):
    """A reward model rates an answer to its end token, through the chat template it was trained with."""
    found = told(capsys, place / "runs" / "reward", "--prompt", "say 3", "say 3", "--response", "yes yes", "no")
    rows = tmp_path / "chats.jsonl"
    chats = [
        [{"role": "user", "content": "say 3"}, {"role": "assistant", "content": text}] for text in ("yes yes", "no")
    ]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    assert told(capsys, place / "runs" / "reward", "--input", rows, "--output", tmp_path / "out.jsonl")
    assert [
        f"{json.loads(line)['prediction']:.4f}" for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ] == found
    assert main(["merge", str(place / "runs" / "reward"), "--output", str(tmp_path / "merged")]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    template = Template(AutoTokenizer.from_pretrained(tmp_path / "merged"))
    assert model.config.num_labels == 1
    for chat, line in zip(chats, found, strict=True):
        text = template.tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
        ids = torch.tensor([template.tokenizer(text, add_special_tokens=False)["input_ids"]])
        assert float(line) == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-3)


def test_tools_of_conversations(place, capsys, tmp_path, monkeypatch):
    """A response is scored after the tools of its row or of --tools, and keys without use are named."""
    monkeypatch.chdir(tmp_path)
    tool = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b", "tools": [tool], "id": 3}) + "\n")
    reward, pair = place / "runs" / "reward", ["--prompt", "a", "--response", "b"]
    with_tools = told(capsys, reward, *pair, "--tools", "tools.json")
    assert with_tools == told(capsys, reward, "--input", "rows.jsonl") != told(capsys, reward, *pair)
    assert main(["score", str(reward), "--input", "rows.jsonl"]) == 0
    assert "keys of rows that are not used: id (1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, part",
    [
        (
            ["llama", "--text", "a"],
            "unsupported-model",
            "llama: ",
        ),
        (["runs/labels", "--text", "a", "b", "--text-pair", "c"], "usage", "--text-pair: "),
        (["runs/reward", "--prompt", "a"], "usage", "--response: "),
        (["runs/labels", "--text", "a", "--response", "b"], "usage", "--response: "),
        (["runs/labels", "--text", "a", "--columns", "text=b"], "no-effect", "--columns"),
        (["runs/labels", "--input", "labels.jsonl", "--columns", "text"], "usage", "--columns: "),
        (["runs/labels", "--input", "none.jsonl"], "not-found", "none.jsonl: "),
        (["runs/labels", "--input", "labels.yml"], "wrong-format", "labels.yml: "),
        (["runs/labels", "--input", "labels.jsonl", "--columns", "text=b"], "wrong-column", "labels.jsonl:1: "),
        (
            ["runs/labels", "--input", "mixed.jsonl"],
            "invalid-row",
            "mixed.jsonl:2: ",
        ),
        (["runs/labels", "--input", "empty.jsonl"], "no-data", "empty.jsonl: "),
        (["runs/labels", "--text", "a", "--tools", "tools.json"], "no-effect", "--tools: "),
        (["runs/labels", "--input", "labels.jsonl", "--tools", "tools.json"], "no-effect", "--tools: "),
        (
            ["runs/reward", "--prompt", "a", "--response", "b", "--chat-template-kwargs", "x=1"],
            "no-effect",
            "chat_template_kwargs.x",
        ),
        (["nowhere/at/all", "--text", "a"], "not-found", "nowhere/at/all: "),
        (["runs/labels"], "usage", "--text --prompt --input"),
    ],
)
def test_what_cannot_be_scored(place, monkeypatch, capsys, wording, arguments, code, part):
    """In one line, with what to do."""
    monkeypatch.chdir(place)
    Path("tools.json").write_text('[{"name": "f"}]')
    (place / "mixed.jsonl").write_text('{"text": "a"}\n{"prompt": "a", "response": "b"}\n')
    (place / "empty.jsonl").write_text("")
    assert main(["score", *arguments]) == 2
    err = capsys.readouterr().err
    wording(err.rpartition("\nminitrain ")[2])
    assert reports(err, code, part)


def test_generate_refuses_such_a_model(place, capsys):
    """Text from a head that was never there would be noise."""
    for name in ("labels", "reward"):
        assert main(["generate", str(place / "runs" / name), "--prompt", "a"]) == 2
        assert reports(capsys.readouterr().err, "unsupported-model", name)
