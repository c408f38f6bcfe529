"""What is imported when: torch takes seconds, so what is wrong with a command or a config is told without it."""

import gc
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minitrain.cli import failure
from minitrain.cli import main as cli
from minitrain.cli.registry import COMMANDS
from tests.commands import WITH_CONFIG
from tests.conftest import ROOT
from tests.messages import problems, reports

PACKAGES = {"argparse", "yaml", "omegaconf", "numpy", "torch", "transformers"}
CONFIG = "model: {name_or_path: tiny}\ndatasets: [rows.jsonl]\n"


def imported(*arguments: str, code: int) -> set[str]:
    """The modules that `python ARGUMENTS` imports; it has to end with this exit code, without a traceback."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr[-1000:]
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder but for rows.jsonl, which is the current one."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')


@pytest.mark.parametrize("arguments", [[], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    """Help, version and usage."""
    assert imported("-m", "minitrain", *arguments, code=0 if arguments else 2) & PACKAGES == {"argparse"}


@pytest.mark.parametrize("arguments", [["--help"], []], ids=" ".join)
def test_help_of_the_script(arguments):
    assert imported(str(ROOT / "train.py"), *arguments, code=0 if arguments else 2) & PACKAGES == {"argparse"}


@pytest.mark.parametrize(
    "arguments",
    [
        *(shlex.split(command.example)[1:] for command in COMMANDS.values()),
        ["teach", "nowhere.yml"], ["validate", "nowhere.yml", "either.yml"], ["validate", "--all", "."],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_is_not_there_imports_no_torch(here, arguments):
    """In a folder without configs and runs, every command fails in a tenth of a second."""
    assert not {"torch", "transformers", "numpy"} & imported("-m", "minitrain", *arguments, code=2)


@pytest.mark.parametrize("command", WITH_CONFIG)
@pytest.mark.parametrize(
    "more", ["datasets: [", "learning_rate: 1", "lr: fast", "seed: -1", "betas: 3", "eval_datasets: [nowhere.jsonl]"]
)
def test_a_wrong_config_imports_no_torch(here, command, more):
    """A YAML syntax error, an unknown key, a wrong type, a value out of its limits, a file that is not there."""
    Path("c.yml").write_text(f"{CONFIG}{more}\n")
    assert not {"torch", "transformers", "numpy"} & imported("-m", "minitrain", command, "c.yml", code=2)


@pytest.mark.parametrize(
    "more, code, key",
    [
        ("loss: {name: dpo, bet: 1}", "unknown-option", "loss.bet: "),
        ("optimizer: Adamm", "not-a-choice", "optimizer: "),
        ("optimizer_args: {momentum: 1}", "unknown-option", "optimizer_args.momentum: "),
        ("betas: [1]", "invalid-value", "betas: "),
        ("optimizer: LBFGS\neps: 1", "not-a-choice", "optimizer: "),
        ("trainer: FSDPTrainer\nfsdp: {cpu_offload: true}\ndevice: cpu", "no-effect", "fsdp.cpu_offload: "),
    ],
)
def test_all_problems_are_told_at_once(here, capsys, more, code, key):
    """Also those that take torch to find, where the config says something of its loss, optimizer or device."""
    Path("c.yml").write_text(f"{CONFIG}lr: fast\n{more}\n")
    assert cli.main(["train", "c.yml"]) == 2
    err = capsys.readouterr().err
    assert len(problems(err)) == 2 and reports(err, "wrong-type", " lr: ") and reports(err, code, key)


def test_a_model_is_what_imports_the_rest():
    """Until then neither FSDP nor the compiler is imported, nor what transformers imports with its models."""
    found = imported("-c", "import minitrain.trainer", code=0)
    late = {"torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "transformers.modeling_utils"}
    assert "torch" in found and not late & found and "transformers.generation.continuous_batching" not in found


def test_the_first_step_imports_what_it_uses(here):
    """Neither trackers, plots and readers of tables, nor the libraries of options that are not set."""
    Path("c.yml").write_text(f"{CONFIG}n_steps: 1\n")
    unused = {
        "wandb",
        "tensorboard",
        "swanlab",
        "trackio",
        "mlflow",
        "matplotlib",
        "pandas",
        "pyarrow",
        "datasets",
        "peft",
        "bitsandbytes",
    }
    code = "import sys; from minitrain.cli.main import main; main(['train', 'c.yml']); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    found = set(done.stdout.splitlines()[-1].split())
    assert "transformers.models.llama.modeling_llama" in found and not unused & found


def test_imports_collect_no_garbage():
    """Collections free nothing while modules are imported, and take a tenth of the time until the first step."""
    collections = []
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    try:
        with failure.importing():
            kept = [[] for _ in range(100_000)]
            during = len(collections)
        kept += [[] for _ in range(100_000)]
        assert during == 0 and collections
    finally:
        gc.callbacks.pop()
