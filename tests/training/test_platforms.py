"""Training where calls of POSIX are missing: they are hidden from a process that then imports minitrain anew."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitrain.io.paths import looks_local
from tests.conftest import DEADLINE, ROOT

# Other libraries are imported before, since they look at the platform, too.
HIDE = r"""
import json, os, signal, sys, types
import minitrain.cli.main, minitrain.trainer, torch.distributed.fsdp, torch.utils.tensorboard
from minitrain.model.tiny import tiny_model
platform, configs = sys.argv[1], json.loads(sys.argv[2])
for name in [name for name in sys.modules if name.partition(".")[0] == "minitrain"]:
    del sys.modules[name]

HIDDEN = {"win32": ("fcntl", "resource", "termios", "pwd", "grp", "readline"), "darwin": ()}[platform]
CALLS = {
    "win32": {
        os: ("fork", "forkpty", "killpg", "setsid", "getpgid", "getuid", "sysconf", "WNOHANG", "wait"),
        signal: ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "SIGCHLD", "setitimer", "ITIMER_REAL"),
    },
    "darwin": {os: ("sched_getaffinity",)},
}[platform]
import fcntl  # for the lock of this test
held = set()

def locking(descriptor, mode, size):
    file = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
    assert file[1] > os.fstat(descriptor).st_size, "other processes could not read the content"
    if file in held:
        raise PermissionError(13, "Permission denied")
    held.add(file)

if platform == "win32":
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
for name in HIDDEN:
    sys.modules[name] = None
for module, names in CALLS.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.platform = platform

from minitrain import RunDirError, Trainer
from minitrain.cli.main import main
for number, config in enumerate(configs):
    with open(f"{number}.yml", "w") as file:
        json.dump(config, file)
    for command in ("validate", "train"):
        assert main([command, f"{number}.yml"]) == 0
if platform == "win32":
    assert held, "nothing was locked"
    try:
        Trainer(configs[0] | {"exp_name": "0", "n_steps": 9}).train()
    except RunDirError as error:
        assert error.code == "locked", error
    else:
        raise AssertionError("two trainings in one folder")
    for name in ("a:b", "a?", "run."):
        assert main(["validate", "0.yml", "--overrides", f"exp_name='{name}'"]) == 2
"""


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_it_trains_on(platform, folder):
    """`tiny` from rows with a checkpoint and LoRA; and online, where rewards are called in the main process."""
    config = {"model": {"name_or_path": "tiny"}, "datasets": ["rows.jsonl"], "total_batch_size": 8, "n_steps": 2}
    lora = {"lora": {"rank": 2, "target_modules": ".*q_proj"}, "save_every_steps": 1}
    rollout = {"num_generations": 2, "prompts_per_round": 8, "max_new_tokens": 2, "rewards": ["length"]}
    configs = [config | lora, config | {"loss": {"name": "policy"}, "rollout": rollout}]
    command = [sys.executable, "-c", HIDE, platform, json.dumps(configs)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for number in range(2):
        assert (Path("runs") / str(number) / "final" / "README.md").exists()
    lines = [json.loads(line) for line in Path("runs/0/metrics.jsonl").read_text().splitlines()]
    assert (lines[-1]["memory_gb"] == 0) == (platform == "win32")


@pytest.mark.parametrize("name", [r"C:\models\base", r"models\base", "c:/models", "./model", "/models/base"])
def test_paths_of_windows_are_no_names_of_the_hub(name):
    assert looks_local(name)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.2-3B", "Qwen/Qwen2.5-1.5B"])
def test_names_of_the_hub(name):
    assert not looks_local(name)


def test_posix_calls_are_in_one_module():
    """Other files import them from io/system.py, but for processes that are killed with what they started."""
    missing = {"fcntl", "resource", "msvcrt", "termios", "pwd", "SIGALRM", "SIGUSR1", "setitimer", "sysconf", "fork"}
    missing |= {"killpg", "setsid", "register_at_fork", "WNOHANG", "getpgid", "getuid", "forkpty", "SIGHUP"}
    allowed = {"io/system.py", "rl/reward_workers.py", "tools/rehearsal/ranks.py"}
    for file in (ROOT / "minitrain").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not used & missing or file.relative_to(ROOT / "minitrain").as_posix() in allowed, file
