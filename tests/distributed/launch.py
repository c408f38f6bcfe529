"""Starts the driver alone or under torchrun."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

DRIVER = Path(__file__).with_name("driver.py")
TIMEOUT = 240


def start(ranks: int, jobs: list[dict], folder: Path, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
    """The driver on so many ranks, in a process group of its own; 0 ranks is without torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    launcher += [f"--{key}={value}" for key, value in options.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen(
        [sys.executable, *launcher, str(DRIVER), str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = TIMEOUT) -> tuple[int, str]:
    """(exit code, output); kills the whole group when it takes too long, which fails the test."""
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"hung: {process.communicate()[0]}") from None


def launch(ranks: int, jobs: list[dict], folder: Path, expect: int = 0, **more) -> str:
    """Runs to the end and returns the output; the exit code has to be the expected one."""
    code, output = finish(start(ranks, jobs, folder, **more))
    assert code == expect, output
    return output


def trace(file: Path) -> list[list]:
    """[step, indices, loss, hash of the weights] of each step."""
    return [json.loads(line) for line in file.read_text().splitlines()]
