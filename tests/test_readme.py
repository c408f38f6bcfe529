"""The commands and the code of the README run, and its examples learn what they promise."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest

from minitrain import load_config
from minitrain.cli.main import main
from tests.conftest import ROOT
from tests.test_docs import blocks

README = ROOT / "README.md"


def commands() -> list[str]:
    return [line for block in blocks(README, "bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory):
    """A directory with the examples, train.py, and the loss that the README defines."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_loss.py").write_text(blocks(README, "python")[1])
    shutil.copytree(ROOT / "example", folder / "example")
    shutil.copy(ROOT / "train.py", folder)
    return folder


def test_the_commands_of_the_readme_run(user_folder, own_registry, monkeypatch, capsys):
    """They run in order in one directory; trainings for a few steps only, make targets as a dry run."""
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
            words += ["--overrides", "exp_name=unused"]  # the run directories hold the short trainings above
        if words[1] == "chat":
            monkeypatch.setattr("builtins.input", lambda prompt: "/exit")
        try:
            code = main(words[1:])
        except SystemExit as stop:
            code = stop.code
        assert code == (words[1] == "compare"), (command, capsys.readouterr())  # 1: the two runs differ


def test_the_python_of_the_readme_runs(user_folder, monkeypatch, capsys):
    """The library example runs for two steps."""
    monkeypatch.chdir(user_folder)
    code, _ = blocks(README, "python")
    assert '"n_steps": 400' in code
    exec(compile(code.replace('"n_steps": 400', '"n_steps": 2'), "README.md", "exec"), {})
    assert "perplexity" in capsys.readouterr().out


def test_the_loss_of_the_documents_trains(make_trainer, own_registry):
    """The example of docs/losses.md is the one of the README; it registers and trains."""
    (code,) = blocks(ROOT / "docs" / "losses.md", "python")
    assert code == blocks(README, "python")[1]
    exec(compile(code, "losses.md", "exec"), {"__name__": "example"})
    trainer = make_trainer("loss.name=top_heavy", "loss.power=1.5")
    trainer.train()
    assert trainer.train_metrics["loss"] > 0


@pytest.mark.parametrize(
    "name, least",
    [
        pytest.param("quickstart-sft", 0.9, marks=pytest.mark.slow(minutes=3)),
        pytest.param("fused-dft", 0.9, marks=pytest.mark.slow(minutes=29)),
        pytest.param("tools", 0.75, marks=pytest.mark.slow(minutes=3)),
    ],
)
def test_an_example_learns_what_it_promises(name, least, user_folder, monkeypatch):
    """The whole run goes from nothing to most of the unseen questions."""
    import torch

    from minitrain import Trainer

    monkeypatch.chdir(user_folder)
    torch.set_num_threads(2)
    config = load_config(f"example/{name}.yml", [f"exp_name=whole-{name}"])
    accuracies = []
    Trainer(config, on_eval_end=lambda t: accuracies.append(t.eval_metrics["exact_match"])).train()
    torch.set_num_threads(1)
    assert accuracies[0] < 0.05 and accuracies[-1] >= least
