"""Starts the driver on ranks that are forked from a process which has imported torch, or under torchrun itself."""

import faulthandler
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("driver.py")
TIMEOUT = 300  # seconds
FORKS = multiprocessing.get_context("forkserver")
# What takes long to import; not minitrain, and so not conftest, since it reads MINITRAIN_FAULT when it is imported.
FORKS.set_forkserver_preload(["torch.distributed.fsdp", "transformers.models.llama.modeling_llama"])


class Ranks:
    """Running drivers, one a rank, that write into one file."""

    def __init__(self, ranks: int, jobs: list[dict], folder: Path, env: dict[str, str], machines: int = 1):
        """0 ranks is one process that knows nothing of ranks."""
        file, port = _jobs_file(jobs, folder), _free_port()
        self.output = folder / "output.txt"
        self.output.write_text("")
        envs = [_rank_env(rank, ranks, machines, port) for rank in range(ranks)] or [{}]
        arguments = [(own | env, str(file), str(self.output)) for own in envs]
        self.processes = [FORKS.Process(target=_driver, args=each, daemon=True) for each in arguments]
        for process in self.processes:
            process.start()
        self.pids = [process.pid for process in self.processes]

    def kill(self, number: int, rank: int = 0) -> None:
        if self.processes[rank].is_alive():
            os.kill(self.pids[rank], number)

    def finish(self, timeout: float = TIMEOUT, patience: float = 0) -> tuple[int, str]:
        """(-9 if a rank was killed, else the code of one that failed, else 0; output).

        When one rank ends badly the others are told to end, as torchrun does; how they end then is not the run's code.
        They first have `patience` seconds to end by themselves.
        """
        end, told = time.monotonic() + timeout, False
        while any(process.is_alive() for process in self.processes):
            if not told and any(process.exitcode for process in self.processes):
                for process in self.processes:
                    process.join(patience)
                end, told = min(end, time.monotonic() + 60), True
                for process in self.processes:
                    process.terminate()
            if time.monotonic() > end:
                for process in self.processes:
                    process.kill()
                raise AssertionError(f"hung: {self.output.read_text()}")
            time.sleep(0.02)
        codes = [process.exitcode for process in self.processes if process.exitcode]
        killed = [code for code in codes if code == -signal.SIGKILL]
        failed = [code for code in codes if code != -signal.SIGTERM]
        return (killed or failed or codes or [0])[0], self.output.read_text()


def _driver(env: dict[str, str], jobs: str, output: str) -> None:
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()  # a crash writes its stacks
    sys.argv = [str(DRIVER), jobs]
    runpy.run_path(str(DRIVER), run_name="__main__")


def _rank_env(rank: int, ranks: int, machines: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    local = ranks // machines
    numbers = {"RANK": rank, "LOCAL_RANK": rank % local, "GROUP_RANK": rank // local, "MASTER_PORT": port}
    numbers |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local}
    return {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in numbers.items()}


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _jobs_file(jobs: list[dict], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    return file


def launch(ranks: int, jobs: list[dict], folder: Path, expect: int = 0, machines: int = 1) -> str:
    """Runs to the end and returns the output; the exit code has to be the expected one."""
    code, output = Ranks(ranks, jobs, folder, {}, machines).finish()
    assert code == expect, output
    return output


def torchrun(ranks: int, jobs: list[dict], folder: Path, env: dict[str, str], **options) -> subprocess.Popen:
    """The driver under the real launcher, in a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launcher += [f"--{key}={value}" for key, value in options.items()]
    return subprocess.Popen(
        [sys.executable, *launcher, str(DRIVER), str(_jobs_file(jobs, folder))],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = TIMEOUT) -> tuple[int, str]:
    """(exit code, output); kills all of it when it takes too long, which fails the test."""
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        for pid in (*children(process.pid), process.pid):
            os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"hung: {process.communicate()[0]}") from None


def children(launcher: int) -> list[int]:
    """The living processes that torchrun started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == launcher and state != "Z":
            found.append(int(folder.name))
    return found


def trace(file: Path) -> list[list]:
    """[step, indices, loss, hash of the weights] of each step."""
    return [json.loads(line) for line in file.read_text().splitlines()]
