"""Who imports whom, how long files and functions are, and that the examples and the commands of the README run."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from minitrain import load_config
from minitrain.cli.main import main
from minitrain.inference.raft_metrics import verdict
from tests.conftest import ROOT

SOURCES = sorted((ROOT / "minitrain").rglob("*.py"))
README = (ROOT / "README.md").read_text()


def test_the_loop_names_no_loss_and_no_model():
    """trainer.py knows neither the name of a loss nor an architecture."""
    text = (ROOT / "minitrain" / "trainer.py").read_text().lower()
    for word in ("sft", "dft", "dpo", "llama", "qwen", "gpt"):
        assert not re.search(rf"\b{word}\b", text), word


def test_files_and_functions_are_short():
    """Files under 400 lines, functions under 60."""
    for file in SOURCES:
        text = file.read_text()
        assert text.count("\n") <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{file}:{node.lineno} {node.name}"


def test_one_step_can_be_followed_in_five_files():
    """config, trainer, loader, policy and sft are under 1,800 lines together."""
    names = ("config/load.py", "trainer.py", "data/loader.py", "model/policy.py", "losses/sft.py")
    assert sum((ROOT / "minitrain" / name).read_text().count("\n") for name in names) < 1800


def test_links_in_the_documents_lead_somewhere():
    """Every relative link of README and docs/ exists."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("file", sorted((ROOT / "example").glob("*.yml")), ids=lambda file: file.name)
def test_every_example_is_a_valid_config(file, monkeypatch):
    """Parsed and checked, with a teacher in the place of the one that another example leaves."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TEACHER", "tiny")
    load_config(file)


def test_the_example_data_are_what_the_script_makes(tmp_path):
    """example/make_data.py gives the committed files, byte for byte, beside it or in a folder that is named; no test
    question is in a training file, and no document of one."""
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


def test_the_teacher_of_the_example_is_right():
    """Each answer about documents has all sections, quotes the oracle, and no distractor is about what is asked."""
    for name in ("train", "test"):
        for row in map(json.loads, (ROOT / "example" / "data" / f"raft-{name}.jsonl").open()):
            found = verdict(row, row["teacher_answer"])
            assert found["quotes"] == ["oracle"] and all(found.values()), row
            asked = row["teacher_answer"].partition(":")[0].removeprefix("What ")
            assert [d["type"] for d in row["documents"] if d["text"].startswith(f"{asked} ")] == ["oracle"]


def test_the_prompts_of_the_demo_are_new_to_the_model():
    """What `make demo` asks at the end stands in no training row."""
    recipe = (ROOT / "Makefile").read_text()
    prompts = re.findall(r'"([^"]+)"', recipe[recipe.index("--prompt") : recipe.index("test:")])
    training = (ROOT / "example" / "data" / "skills-train.jsonl").read_text()
    assert len(prompts) == 3 and not any(f'"{prompt}"' in training for prompt in prompts)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory):
    """An empty folder with the examples and train.py, as a user has them, and the loss that the README writes."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_loss.py").write_text(blocks("python")[1])
    shutil.copytree(ROOT / "example", folder / "example")
    shutil.copy(ROOT / "train.py", folder)
    return folder


def test_the_commands_of_the_readme_run(user_folder, own_registry, monkeypatch, capsys):
    """In order, in one folder; trainings for a few steps only, make targets by their recipe."""
    monkeypatch.chdir(user_folder)
    short = ["n_steps=2", "warmup_ratio=0.5", "eval_generate.n_examples=2", "log_every_steps=1"]
    for command in commands():
        words = shlex.split(command)
        if words[0] == "make":
            assert subprocess.run(["make", "-n", "-C", ROOT, *words[1:]], capture_output=True).returncode == 0, command
            continue
        if words[0] == "torchrun":
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run([*torchrun, *words[1:], *short], env=env, capture_output=True, text=True)
            assert done.returncode == 0 and "done: runs" in done.stdout, f"{command}\n{done.stdout}\n{done.stderr}"
            continue
        if words[:2] == ["python", "train.py"]:
            words = ["minitrain", "train", *words[2:]]
        if words[1] == "train":
            drop = ["n_epochs=1"] if "fused" in command else []
            more = [*short[1:], *drop, "datasets.0.n_examples=4"] if drop else short
            answers = not any(name in command for name in ("classify", "reward", "policy-grpo"))
            more = [option for option in more if answers or "eval_generate" not in option]
            words += more if "--overrides" in words else ["--overrides", *more]
        if words[1] == "validate":
            words += ["--overrides", "exp_name=unused"]  # the run folders hold the short trainings above
        if words[1] == "chat":
            monkeypatch.setattr("builtins.input", lambda prompt: "/exit")
        try:
            code = main(words[1:])
        except SystemExit as stop:
            code = stop.code
        assert code == (words[1] == "compare"), (command, capsys.readouterr())  # 1: the two runs differ


def test_the_python_of_the_readme_runs(user_folder, monkeypatch, capsys):
    """The library example, for two steps."""
    monkeypatch.chdir(user_folder)
    code, _ = blocks("python")
    code = code.replace('"n_steps=400"', '"n_steps=2", "eval_generate.n_examples=2"')
    exec(compile(code, "README.md", "exec"), {})
    assert "right" in capsys.readouterr().out


def test_the_loss_of_the_documents_trains(make_trainer, own_registry):
    """The example of docs/losses.md registers and trains; it is the README's."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "losses.md").read_text(), re.S)
    assert code == blocks("python")[1]
    exec(compile(code, "losses.md", "exec"), {"__name__": "example"})
    trainer = make_trainer("loss.name=top_heavy", "loss.power=1.5")
    trainer.train()
    assert trainer.train_metrics["loss"] > 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("quickstart-sft", marks=pytest.mark.slow(minutes=3)),
        pytest.param("fused-dft", marks=pytest.mark.slow(minutes=29)),
    ],
)
def test_an_example_learns_what_it_promises(name, user_folder, monkeypatch):
    """The whole run: from nothing to 90 % of unseen questions."""
    import torch

    from minitrain import Trainer

    monkeypatch.chdir(user_folder)
    torch.set_num_threads(2)
    config = load_config(f"example/{name}.yml", [f"exp_name=whole-{name}"])
    accuracies = []
    Trainer(config, on_eval_end=lambda t: accuracies.append(t.eval_metrics["exact_match"])).train()
    torch.set_num_threads(1)
    assert accuracies[0] < 0.05 and accuracies[-1] >= 0.9
