"""The configs under example/ are valid and train as they are, and the example data are what their script makes."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minitrain import load_config
from minitrain.cli.main import main
from minitrain.config.sections import DatasetConfig
from minitrain.data.encode import TruncationConfig, encode
from minitrain.data.examples import to_example
from minitrain.data.template import make_template
from minitrain.inference.parse import ResponseParser
from minitrain.inference.raft_metrics import grade_response
from minitrain.model.tiny import tiny_tokenizer
from tests.conftest import ROOT

EMBEDDED = [
    file
    for file in sorted((ROOT / "example").glob("*.yml"))
    if yaml.safe_load(file.read_text())["model"]["name_or_path"] == "tiny"
]
SHORT = ("log_every_steps=1", "eval_every_steps=0", "save_every_steps=0")


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """A folder with the examples, and nothing else."""
    shutil.copytree(ROOT / "example", tmp_path / "example")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEACHER", "tiny")
    monkeypatch.setenv("POLICY", "tiny")
    return tmp_path


def train(name: str, *overrides: str) -> int:
    """Trains an example for two steps, with answers where it has some."""
    config = yaml.safe_load(Path(f"example/{name}.yml").read_text())
    few = ["eval_generate.n_examples=2"] if "eval_generate" in config else []
    stop = ["early_stopping.patience=0"] if config.get("early_stopping", {}).get("patience") else []
    short = ("n_steps=2", "warmup_ratio=0.5", *SHORT, *few, *stop)
    return main(["train", f"example/{name}.yml", "--overrides", *short, *overrides])


@pytest.mark.slow
@pytest.mark.parametrize("file", EMBEDDED, ids=lambda file: file.name)
def test_every_embedded_example_trains(file, user_folder, capsys):
    """Two steps and an evaluation, and a model at the end."""
    assert train(file.stem) == 0, capsys.readouterr().err
    assert f"done: runs/{file.stem}/final" in capsys.readouterr().out


def test_sft_then_dpo_by_an_archive(user_folder, capsys):
    """Two commands: DPO starts from the weights of SFT, which are its reference, too."""
    assert train("chat-sft") == 0
    assert train("chat-dpo", "model.archive=runs/chat-sft/final", "lr=0") == 0, capsys.readouterr().err
    sft, dpo = (load_file(f"runs/chat-{name}/final/model.safetensors") for name in ("sft", "dpo"))
    assert all(torch.equal(tensor, dpo[name]) for name, tensor in sft.items())
    losses = [json.loads(line)["loss"] for line in Path("runs/chat-dpo/metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([0.693147] * len(losses), abs=1e-5)


def test_a_table_with_templates(user_folder):
    """The texts of csv-sft.yml are what its templates make of the columns."""
    (dataset,) = load_config("example/csv-sft.yml").datasets
    asked, told = to_example({"task": "1 + 1 =", "solution": "2"}, dataset).messages
    assert asked["content"] == "Task: 1 + 1 =" and told["content"] == "The answer is 2."


def test_the_library_from_python(user_folder, capsys):
    """Hooks, a loss by name, a run that is interrupted and goes on, answers, chat."""
    history = runpy.run_path("example/library.py")["main"](4)
    told = capsys.readouterr().out
    assert (
        "stopped by SIGINT at step 2" in told
        and "doubles: loss " in told
        and "resuming from runs/library/checkpoints/step-2" in told
    )
    assert list(history.losses) == [0, 1, 2, 3, 4]  # that of step 2 was interrupted, and made up for
    assert "'role': 'assistant'" in told.splitlines()[-1]


def test_dialogues_have_the_tokens_of_the_dpo_authors(user_folder):
    """human-assistant.jinja: prompt up to ``Assistant:``, then the answer with its space and EOS, tokenised apart."""
    tokenizer = tiny_tokenizer()
    config = load_config("example/pythia28-sft.yml")
    template = make_template(tokenizer, config, "conversation")
    start = "\n\nHuman: What is up?\n\nAssistant: Not much.\n\nHuman: And now?\n\nAssistant:"
    row = {"chosen": f"{start} The sky.", "rejected": f"{start} Go away."}
    record = to_example(row, DatasetConfig("hh.jsonl"), "conversation")
    (tokens,) = encode(record, template, TruncationConfig(512, "prompt", 256))
    answer = tokenizer(" The sky.")["input_ids"] + [tokenizer.eos_token_id]
    prompt = tokenizer(start)["input_ids"]
    assert list(tokens.ids) == prompt + answer
    assert list(tokens.mask) == [False] * len(prompt) + [True] * len(answer)


@pytest.mark.parametrize("file", sorted((ROOT / "example").glob("*.yml")), ids=lambda file: file.name)
def test_every_example_is_a_valid_config(file, monkeypatch):
    """Each config passes all checks, with the embedded model as the teacher that another example trains."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TEACHER", "tiny")
    monkeypatch.setenv("POLICY", "tiny")
    load_config(file)


def test_the_example_data_are_what_the_script_makes(tmp_path):
    """example/make_data.py writes the committed files, byte for byte, beside itself or into a given directory. No test
    question and no document of one is in a training file."""
    shutil.copy(ROOT / "example" / "make_data.py", tmp_path)
    for folder in ("data", "new/samples"):
        where = [] if folder == "data" else [tmp_path / folder]
        subprocess.run([sys.executable, tmp_path / "make_data.py", *where], check=True)
        for file in (ROOT / "example" / "data").iterdir():
            assert (tmp_path / folder / file.name).read_bytes() == file.read_bytes(), file.name
    tests = set((tmp_path / "data" / "skills-test.jsonl").read_text().splitlines())
    assert not tests & set((tmp_path / "data" / "skills-train.jsonl").read_text().splitlines())
    documents = [
        {d["text"] for line in (tmp_path / "data" / f"raft-{name}.jsonl").open() for d in json.loads(line)["documents"]}
        for name in ("train", "test")
    ]
    assert all(documents) and not documents[0] & documents[1]


def test_calls_of_the_example(user_folder):
    """Each row has a call of a listed function with its arguments, and no request of the test file is in training."""
    config = load_config("example/tools.yml")
    (dataset,), template = config.datasets, make_template(tiny_tokenizer(), config, "conversation")
    keys = {"light(room, state)", "heat(room, degrees)", "play(genre)"}
    requests = {}
    for name in ("train", "test"):
        rows = [json.loads(line) for line in Path(f"example/data/tools-{name}.jsonl").open()]
        requests[name] = {m["content"] for row in rows for m in row["messages"] if m["role"] == "user"}
        for row in rows:
            (tokens,) = encode(to_example(row, dataset), template, TruncationConfig(config.max_length))
            lines = template.tokenizer.decode(tokens.ids).splitlines()
            assert set(lines[:3]) == keys
            calls = re.findall("<tool_call>(.*)</tool_call>", "\n".join(lines))
            said = [call["function"] for m in row["messages"] for call in m.get("tool_calls", ())]
            assert said and [json.loads(call) for call in calls] == said
            assert all(f"{call['name']}({', '.join(call['arguments'])})" in keys for call in said)
    assert ResponseParser(template).reads_calls
    assert len(requests["test"]) == 40 and not requests["test"] & requests["train"] - {"Hello!", "Thank you!", "Bye!"}


def test_the_teacher_of_the_example_is_right():
    """Each response about documents has all sections and quotes the oracle, and no distractor is about the question."""
    for name in ("train", "test"):
        for row in map(json.loads, (ROOT / "example" / "data" / f"raft-{name}.jsonl").open()):
            found = grade_response(row, row["teacher_answer"])
            assert found["quotes"] == ["oracle"] and all(found.values()), row
            asked = row["teacher_answer"].partition(":")[0].removeprefix("What ")
            assert [d["type"] for d in row["documents"] if d["text"].startswith(f"{asked} ")] == ["oracle"]


def test_the_prompts_of_the_demo_are_new_to_the_model():
    """No prompt that `make demo` shows at the end is in a training row."""
    recipe = (ROOT / "Makefile").read_text()
    prompts = re.findall(r'"([^"]+)"', recipe[recipe.index("--prompt") : recipe.index("test:")])
    training = (ROOT / "example" / "data" / "skills-train.jsonl").read_text()
    assert len(prompts) == 3 and not any(f'"{prompt}"' in training for prompt in prompts)
