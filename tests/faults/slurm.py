"""A double of Slurm: a scheduler that runs a batch script, preempts it and requeues it, with its commands.

Scripts call this file as `srun COMMAND ...`, `scontrol ...` and `minitrain ...`. The last one is real but for its
start: the scheduler forks the process from one that has imported torch, which makes a hundred starts bearable.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

TIMEOUT = 3000  # seconds, for one attempt, which may be 1,000 steps on a busy machine
STATE = "SLURM_DOUBLE"  # the folder of the job: tasks, a request to requeue, the socket of the scheduler


def task_environment(environment: dict[str, str], number: int) -> dict[str, str]:
    per_node = int(environment["SLURM_NTASKS_PER_NODE"])
    numbers = {"SLURM_PROCID": number, "SLURM_LOCALID": number % per_node, "SLURM_NODEID": number // per_node}
    return environment | {name: str(value) for name, value in numbers.items()}


def srun(command: list[str]) -> int:
    """Start a task of each rank and return the highest exit code; a task that a signal killed has 128 + its number."""
    state = Path(os.environ[STATE])
    environments = [task_environment(dict(os.environ), number) for number in range(int(os.environ["SLURM_NTASKS"]))]
    tasks = [subprocess.Popen(command, env=environment) for environment in environments]
    (state / "tasks").write_text(json.dumps([task.pid for task in tasks]))
    codes = [task.wait() for task in tasks]
    (state / "tasks").unlink()
    return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(arguments: list[str]) -> int:
    if arguments[0] == "show":
        assert arguments[1] == "hostnames"
        print("127.0.0.1")
        return 0
    assert arguments == ["requeue", os.environ["SLURM_JOB_ID"]], arguments
    (Path(os.environ[STATE]) / "requeue").touch()
    return 0


def minitrain(arguments: list[str]) -> int:
    """Have the scheduler fork the command, pass signals on to it, and return its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(Path(os.environ[STATE]) / "scheduler"))
        stream = connection.makefile("rw")
        request = {"environment": dict(os.environ), "folder": os.getcwd(), "arguments": arguments}
        print(json.dumps(request), file=stream, flush=True)
        pid = int(stream.readline())
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        code = int(stream.readline())
        return code if code >= 0 else 128 - code


def _task(environment: dict[str, str], folder: str, arguments: list[str], output: str) -> None:
    """Run a command in a forked process, as `python -m minitrain` would."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from minitrain.cli.main import run

    run(arguments)


class Scheduler:
    """Runs batch scripts, and preempts them.

    Attributes:
        output: The log of all attempts.
        codes: The exit code of the script in each attempt.
    """

    def __init__(self, folder: Path, processes):
        """
        Args:
            folder: A new folder.
            processes: A context of multiprocessing that forks from a process that has imported torch.
        """
        folder.mkdir()
        self.folder, self.processes, self.output, self.codes = folder, processes, folder / "output.txt", []
        for name in ("srun", "scontrol", "minitrain"):
            (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {name} "$@"\n')
            (folder / name).chmod(0o755)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(folder / "scheduler"))
        self.server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.server.accept()
            threading.Thread(target=self._start, args=[connection], daemon=True).start()

    def _start(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rw") as stream:
            request = json.loads(stream.readline())
            task = self.processes.Process(target=_task, args=(*request.values(), str(self.output)), daemon=True)
            task.start()
            print(task.pid, file=stream, flush=True)
            task.join()
            print(task.exitcode, file=stream, flush=True)

    def sbatch(
        self, *arguments: str, ledger: Path, preemptions: Sequence[signal.Signals], array_task: int | None = None
    ) -> int:
        """Run a script until it is not requeued, and return its exit code.

        Each preemption sends its signal after the attempt's first step: SIGUSR1, as before the time limit, to the
        tasks; SIGTERM, after which Slurm requeues by itself, also to the script.

        Args:
            arguments: Options, the script and its arguments.
            ledger: A file that grows with each step.
            preemptions: The signals, one an attempt.
            array_task: The number of the task in an array.
        """
        n = next(i for i, argument in enumerate(arguments) if not argument.startswith("-"))
        environment = self._environment(Path(arguments[n]).read_text(), arguments[:n])
        if array_task is not None:
            environment |= {"SLURM_ARRAY_TASK_ID": str(array_task)}
        for number in [*preemptions, None]:
            log = open(self.output, "a")
            script = subprocess.Popen(["bash", *arguments[n:]], env=environment, stdout=log, stderr=log)
            try:
                if number is not None:
                    self._preempt(script, ledger, number)
                self.codes.append(script.wait(TIMEOUT))
            finally:
                log.close()
                script.kill()
            requested = (self.folder / "requeue").exists()
            (self.folder / "requeue").unlink(missing_ok=True)
            if not requested and number != signal.SIGTERM:
                break
        return self.codes[-1]

    def _environment(self, script: str, options: Sequence[str]) -> dict[str, str]:
        given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", script, re.MULTILINE))
        given |= dict(re.findall(r"--([\w-]+)=(\S+)", " ".join(options)))
        n_nodes, per_node = int(given.get("nodes", 1)), int(given.get("ntasks-per-node", 1))
        assert {"requeue", "open-mode"} <= given.keys() and given["signal"].startswith("USR1@")
        return os.environ | {
            STATE: str(self.folder),
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": f"node[1-{n_nodes}]",
            "SLURM_NTASKS_PER_NODE": str(per_node),
            "SLURM_NTASKS": str(n_nodes * per_node),
        }

    def _preempt(self, script: subprocess.Popen, ledger: Path, number: signal.Signals) -> None:
        before, end = _size(ledger), time.monotonic() + TIMEOUT
        while _size(ledger) <= before:
            assert script.poll() is None and time.monotonic() < end, self.output.read_text()[-3000:]
            time.sleep(0.002)
        for pid in json.loads((self.folder / "tasks").read_text()):
            os.kill(pid, number)
        if number == signal.SIGTERM:
            script.send_signal(number)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol, "minitrain": minitrain}[sys.argv[1]](sys.argv[2:]))
