"""Without trackers, nothing that minitrain does opens a connection or looks up a host name.

Sockets of the machine itself (AF_UNIX) are allowed: multiprocessing and reward functions use them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DEADLINE, ROOT

# A file in which each line is a connection. An audit hook also sees those that are refused, and those of forks.
WATCH = """
import os, socket, sys
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
def watch(event, args):
    sends = event in ("socket.connect", "socket.sendto", "socket.sendmsg") and args[0].family != socket.AF_UNIX
    if sends or event in LOOKUPS:
        os.write(log, f"{event} {args[1:] if sends else args}\\n".encode())
sys.addaudithook(watch)
"""
COMMANDS = """
import json
from minitrain.cli.main import main
for command in json.loads(sys.argv[1]):
    assert main(command) == 0, command
"""
CONTROL = """
import contextlib
pid = os.fork()
with contextlib.suppress(OSError), socket.socket(socket.AF_INET) as opened:
    opened.settimeout(1)
    opened.connect(("127.0.0.1", 9))
if pid:
    os.waitpid(pid, 0)
else:
    os._exit(0)
"""


def connections(code: str, *arguments: str) -> list[str]:
    """Return the connections that a process and its forks make, without the options that keep libraries offline."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("_OFFLINE", "_MODE"))}
    command = [sys.executable, "-c", WATCH + code, "connections", *arguments]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Path("connections").read_text().splitlines()


def test_the_hook_sees_connections(folder):
    assert connections(CONTROL) == ["socket.connect (('127.0.0.1', 9),)"] * 2


ROLLOUT = {"num_generations": 2, "prompts_per_round": 8, "max_new_tokens": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"name_or_path": "tiny"}, "report_to_tensorboard": True},
        {"lora": {"rank": 2}},
        {"loss": {"name": "policy"}, "rollout": {**ROLLOUT, "rewards": ["length"]}},
    ],
    ids=["tiny", "lora", "online"],
)
def test_a_training_opens_no_connection(options, folder):
    """A training of `tiny`, of a local folder with LoRA, and on sampled answers; then answers of the result."""
    config = {"datasets": ["rows.jsonl"], "eval_datasets": ["rows.jsonl"], "model": {"name_or_path": "./model"}}
    config |= {"output_dir": "out", "total_batch_size": 8, "n_steps": 2, "num_proc": 2}
    Path("c.yml").write_text(json.dumps(config | options))
    generate = ["generate", "out/c", "--prompt", "a", "--max-new-tokens", "2", "--output", "answers.jsonl"]
    assert connections(COMMANDS, json.dumps([["validate", "c.yml"], ["train", "c.yml"], generate])) == []
