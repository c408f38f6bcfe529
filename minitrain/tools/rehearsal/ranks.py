"""Run a command on several ranks of this machine, as torchrun does, and leave no process behind."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 10.0  # after one rank has failed, for the messages of the others


def run_ranks(
    command: Sequence[str], n_ranks: int, n_machines: int, logs: Path, environment: Mapping[str, str]
) -> list[int]:
    """Run a command on each rank, and return their exit codes.

    Args:
        command: The command line.
        n_ranks: The number of ranks; 1 runs it without torchrun's variables.
        n_machines: The number of machines that the ranks believe to be on.
        logs: A new folder for the output of each rank, `0.txt` and so on.
        environment: Variables besides those of this process.
    """
    logs.mkdir()
    port, processes = _free_port(), []
    try:
        for rank in range(n_ranks):
            of_rank = _rank_variables(rank, n_ranks, n_machines, port) if n_ranks > 1 else {}
            with open(logs / f"{rank}.txt", "wb") as log:
                process = subprocess.Popen(
                    command,
                    env=os.environ | dict(environment) | of_rank,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches this process alone, which ends them
                )
            processes.append(process)
        _wait(processes)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [process.returncode for process in processes]


def _wait(processes: Sequence[subprocess.Popen]) -> None:
    """Wait until all processes have ended, or for `GRACE_SECONDS` after the first that failed."""
    end = float("inf")
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < end:
        if any(codes):
            end = min(end, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.05)


def _rank_variables(rank: int, n_ranks: int, n_machines: int, port: int) -> dict[str, str]:
    n_local = n_ranks // n_machines
    numbers = {"RANK": rank, "LOCAL_RANK": rank % n_local, "GROUP_RANK": rank // n_local, "WORLD_SIZE": n_ranks}
    numbers |= {"LOCAL_WORLD_SIZE": n_local, "MASTER_PORT": port}
    numbers["OMP_NUM_THREADS"] = max(1, (os.cpu_count() or 1) // n_ranks)
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()}


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
