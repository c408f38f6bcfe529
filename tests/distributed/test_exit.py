"""How a process with ranks ends when a gloo thread still has something to free."""

import subprocess
import sys
import textwrap

import pytest

from tests.conftest import DEADLINE

# Rank 1 takes part in a collective late. Rank 0 holds Python's lock from before that until it ends, so that its gloo
# thread, which frees the tensor, waits for the lock; if that is taken in the interpreter's shutdown, the process aborts
# (PyTorch 2.13, Python 3.11: status -6).
SCRIPT = """
    import atexit, os, sys, time
    import torch, torch.distributed as dist
    from minitrain.distributed.process import exit_process, let_threads_settle

    class SlowToGo:
        def __del__(self, sleep=time.sleep):
            sleep(1)

    rank = 0 if os.fork() else 1
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    if rank == 1:
        time.sleep(1)
        dist.all_reduce(torch.ones(1))
        os._exit(0)
    sys.setswitchinterval(1000)
    tensor, slow = torch.ones(1), SlowToGo()
    work = dist.all_reduce(tensor, async_op=True)
    del tensor, work
    end = time.monotonic() + 3
    while time.monotonic() < end:
        pass
"""
ENDS = {
    "exit_process": """
    atexit.register(print, "registered")
    print("printed", end=" ")
    exit_process(7)
    """,
    "a script's own end": """
    atexit.register(let_threads_settle)  # as FSDPTrainer does
    sys.exit(7)
    """,
}


@pytest.mark.parametrize("end, output", [("exit_process", "printed registered\n"), ("a script's own end", "")])
def test_the_exit_code_is_kept(tmp_path, end, output):
    """The process ends with its own code, after atexit functions and with all output."""
    script = textwrap.dedent(SCRIPT) + textwrap.dedent(ENDS[end])
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (7, output), done
