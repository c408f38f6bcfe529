"""How a process of several ranks ends.

A gloo thread may still free the tensors of a finished collective, which takes Python's lock, when the interpreter shuts
down. Python then ends that thread, and C++ aborts the process: "terminate called without an active exception", exit
status 134 of a run that is done (pytorch#190489).
"""

import atexit
import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

SETTLE_SECONDS = 2.0
N_POLLS = 5  # in a row in which no other thread wants to run


def exit_process(code: int = 0) -> NoReturn:
    """End the process with an exit code, like `sys.exit` but without the interpreter's shutdown.

    Threads are joined, functions registered with `atexit` are called, and output is flushed before.
    """
    threading._shutdown()  # these two calls are what multiprocessing does before its own os._exit
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)


def let_threads_settle() -> None:
    """Wait until no other thread of this process wants to run, at most 2 s; registered with `atexit` by ranks.

    A script that does not end with `exit_process` then rarely meets the abort, and keeps its own exit code.
    """
    end, quiet_polls = time.monotonic() + SETTLE_SECONDS, 0
    while quiet_polls < N_POLLS and time.monotonic() < end:
        time.sleep(0.01)  # releases Python's lock to those that wait for it
        quiet_polls = 0 if _other_threads_run() else quiet_polls + 1


def _other_threads_run() -> bool:
    """Return whether another thread is running or runnable; always False where there is no /proc."""
    main = str(threading.get_native_id())
    for stat in Path("/proc/self/task").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if stat.parent.name != main and stat.read_text().rpartition(")")[2].split()[0] == "R":
                return True
    return False


def world_size() -> int:
    """Processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))
