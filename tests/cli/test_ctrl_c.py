"""Ctrl-C and SIGTERM at every stage of every command: exit code 130 or 143, one line, nothing half written, no process
left; and what `kill -9` leaves.

What it does to a training in its steps and saves is in tests/faults.
"""

import builtins
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minitrain.cli.main import main
from tests.commands import CASES
from tests.conftest import DEADLINE, ROOT
from tests.distributed.launch import FORKS


def _command(arguments: list[str], stop: str, seconds: float, folder: str) -> None:
    """`minitrain` in a process group of its own, which waits in the function `stop`."""
    os.chdir(folder)
    os.setpgrp()
    sys.stdin = io.StringIO("hello\n")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"../{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)

    def wait(*args, **kwargs):
        Path("../reached").touch()
        time.sleep(seconds)

    module, _, name = stop.partition(":")
    owner = importlib.import_module(f"minitrain.{module}")
    *inside, name = name.split(".")
    for part in inside:
        owner = getattr(owner, part)
    assert hasattr(owner, name) or hasattr(builtins, name), f"there is no {stop}"
    setattr(owner, name, wait)
    sys.exit(main(arguments))


class Command:
    """A command that runs in the current folder; what it writes comes into files beside it."""

    def __init__(self, *arguments: str, stop: str, seconds: float = DEADLINE):
        self.outside = Path.cwd().parent
        self.process = FORKS.Process(target=_command, args=(list(arguments), stop, seconds, os.getcwd()))
        self.process.start()

    def interrupt(self, number: int = signal.SIGINT, to_group: bool = True, processes: int = 1) -> int:
        """A signal where it waits; returns the exit code, when no process of the group is left.

        Args:
            to_group: To the whole group, as a terminal sends Ctrl-C, or to the command alone.
            processes: Of the group, to wait for.
        """
        end = time.monotonic() + DEADLINE
        while not (self.outside / "reached").exists() or len(group(self.process.pid)) < processes:
            assert self.process.is_alive() and time.monotonic() < end, self.read("out") + self.read("err")
            time.sleep(0.02)
        (os.killpg if to_group else os.kill)(self.process.pid, number)
        self.process.join(DEADLINE)
        assert self.process.exitcode is not None, "it goes on"
        self._assert_none_left()
        return self.process.exitcode

    def _assert_none_left(self) -> None:
        """Workers may end a moment after their parent was killed."""
        end = time.monotonic() + DEADLINE / 10
        while left := group(self.process.pid):
            if time.monotonic() > end:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise AssertionError(f"still there: {left}")
            time.sleep(0.02)

    def read(self, name: str) -> str:
        file = self.outside / name
        return file.read_text() if file.exists() else ""


def group(number: int) -> list[str]:
    """The living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(member) == number and state != "Z":
            found.append(stat.parent.name)
    return found


def everything() -> dict[str, bytes]:
    """All files of the current folder but the tokens, which are kept whole or not at all."""
    files = [path for path in Path().rglob("*") if path.is_file() and "cache" not in path.parts]
    return {str(path): path.read_bytes() for path in files}


GENERATE = CASES["generate"].arguments
CACHE_TEACHER = CASES["cache-teacher"].arguments


@pytest.mark.parametrize(
    "stop, arguments",
    [
        *((case.stage, case.arguments) for case in CASES.values()),
        ("cli.config_commands:importlib.util.spec_from_file_location", ["train", "c.yml", "--plugin", "p.py"]),
        ("training.setup:load_tokenizer", ["train", "c.yml"]),
        ("data.cache_writer:CacheWriter.finish", ["train", "c.yml"]),
        ("training.setup:build_policy", ["train", "c.yml"]),
        ("model.load:load_model", ["train", "c.yml"]),
        ("training.loading:prepare_policy", ["train", "c.yml"]),
        ("training.loading:build_aux_models", ["train", "c.yml"]),
        ("inference.generate:load_merged", GENERATE),
        ("inference.generate:Generator.stream", ["chat", "runs/lora"]),
        ("model.save:save_weights", CASES["merge"].arguments),
        ("inference.teacher_cache:top_k_logprobs", CACHE_TEACHER),
        ("training.setup:read_data", ["inspect", "c.yml"]),
        ("training.setup:build_policy", ["validate", "c.yml"]),
    ],
)
def test_one_line_and_nothing_changed(trained_folder, stop, arguments):
    """While it waits in a function of each stage, Ctrl-C ends it; no file is new, gone or other than before."""
    Path("p.py").touch()
    before = everything()
    command = Command(*arguments, stop=stop)
    assert command.interrupt() == 130
    assert command.read("err") == "minitrain: interrupted\n"
    assert everything() == before and not list(Path().rglob(".building-*"))


SIGTERM_STAGES = [
    ("training.setup:load_tokenizer", ["train", "c.yml"]),
    ("data.cache_writer:CacheWriter.finish", ["train", "c.yml"]),
    ("training.setup:build_policy", ["train", "c.yml"]),
    ("training.loading:build_aux_models", ["train", "c.yml"]),
    ("training.run_dir:RunDir.find_checkpoint", ["train", "c.yml"]),
    ("inference.generate:Generator._generate", GENERATE),
    ("inference.teacher_cache:_write_outputs", CACHE_TEACHER),
]


@pytest.mark.parametrize("stop, arguments", SIGTERM_STAGES)
def test_sigterm_before_training(trained_folder, stop, arguments):
    """It ends a command as Ctrl-C does, with the exit code and the name of the signal."""
    before = everything()
    command = Command(*arguments, stop=stop)
    assert command.interrupt(signal.SIGTERM, to_group=False) == 143
    assert command.read("err") == "minitrain: stopped by SIGTERM\n"
    assert not list(Path().rglob(".building-*"))
    Path("runs/c/.lock").unlink(missing_ok=True)
    assert everything() == before


@pytest.fixture
def large_file(trained_folder):
    """Rows that several processes tokenise."""
    row = json.dumps({"prompt": "a", "response": "b" * 40_000})
    Path("rows.jsonl").write_text(f"{row}\n" * 120)  # a small file is tokenised by one process


TOKENISING = {"stop": "data.cache:Encoder.__call__"}
TWO_WORKERS = ("train", "c.yml", "--overrides", "num_proc=2")


@pytest.mark.parametrize("number, to_group", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_while_several_processes_tokenise(large_file, number, to_group):
    """The parent answers, its workers end with it, and nothing is left of the cache."""
    command = Command(*TWO_WORKERS, **TOKENISING, seconds=2)
    assert command.interrupt(number, to_group, processes=3) == 128 + number
    told = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    assert command.read("err") == f"minitrain: {told}\n"
    assert not list(Path("cache").iterdir()) and not (Path("runs") / "c").exists()


def test_kill_9_while_several_processes_tokenise(large_file, capsys):
    """The workers end without a word from their parent; the next start removes what it left, and makes the cache."""
    command = Command(*TWO_WORKERS, **TOKENISING)
    assert command.interrupt(signal.SIGKILL, to_group=False, processes=3) == -signal.SIGKILL
    assert len(list(Path("cache").glob(".building-*"))) == 1
    assert main(["train", "c.yml", "--overrides", "num_proc=1", "max_length=64"]) == 0, capsys.readouterr().err
    assert not list(Path("cache").glob(".building-*")) and list(Path("cache").glob("*.safetensors"))


def test_in_a_rehearsal(trained_folder):
    """The ranks, which are in sessions of their own, end with it, and their folder is removed."""
    before = everything()
    command = Command("rehearse", "c.yml", stop="tools.rehearsal.ranks:_wait")
    assert command.interrupt() == 130
    assert command.read("err") == "minitrain: interrupted\n" and everything() == before
    here = [link.parent.name for link in Path("/proc").glob("[0-9]*/cwd") if _target(link) == os.getcwd()]
    assert here == [str(os.getpid())]


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # the process has ended, or is another user's
        return ""


def test_in_the_first_evaluation(trained_folder, capsys):
    """The signal is kept, a checkpoint of step 0 is written, and the same command resumes from it."""
    command = Command("train", "c.yml", stop="training.step:failpoint", seconds=1)
    assert command.interrupt() == 130
    assert "stopped by SIGINT at step 0." in command.read("out")
    assert command.read("err") == "SIGINT: training stops at the next step and saves a checkpoint\n"
    assert main(["train", "c.yml"]) == 0
    assert "resuming from runs/c/checkpoints/step-0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, number, told",
    [
        (["generate", "tiny", "--prompt", "a"], signal.SIGINT, "interrupted"),
        (["inspect", "c.yml"], signal.SIGINT, "interrupted"),
        (["inspect", "c.yml"], signal.SIGTERM, "stopped by SIGTERM"),
    ],
)
def test_while_importing(trained_folder, arguments, number, told):
    """Also in the middle of numpy, which would swallow the exception."""
    command = [sys.executable, "-X", "importtime", "-m", "minitrain", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    loading = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while "numpy" not in loading.stderr.readline():
            assert loading.poll() is None
        loading.send_signal(number)
        err = loading.communicate(timeout=DEADLINE)[1]
    finally:
        loading.kill()
    assert loading.returncode == 128 + number and err.endswith(f"minitrain: {told}\n") and "Traceback" not in err
