"""Process environment and exit with several ranks.

When the interpreter shuts down, a gloo thread may still free tensors of a finished collective, which takes the GIL.
Python then ends that thread, and C++ aborts the process after a successful run: "terminate called without an active
exception", exit status 134 (pytorch#190489).
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
N_POLLS = 5  # consecutive polls in which no other thread is runnable


def exit_process(code: int = 0) -> NoReturn:
    """End the process with an exit code, like `sys.exit` but without interpreter shutdown.

    It first joins threads, calls functions registered with `atexit`, and flushes output.
    """
    threading._shutdown()  # these two calls are what multiprocessing does before its own os._exit
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or without a reader
            stream.flush()
    os._exit(code)


def let_threads_settle() -> None:
    """Wait until no other thread of this process is runnable, for at most 2 s. Ranks register it with `atexit`.

    The abort is then rare in a script that does not end with `exit_process`, and its exit code is kept.
    """
    end, quiet_polls = time.monotonic() + SETTLE_SECONDS, 0
    while quiet_polls < N_POLLS and time.monotonic() < end:
        time.sleep(0.01)  # releases the GIL to waiting threads
        quiet_polls = 0 if _other_threads_run() else quiet_polls + 1


def _other_threads_run() -> bool:
    """Return whether another thread is running or runnable; always False without /proc."""
    main = str(threading.get_native_id())
    for stat in Path("/proc/self/task").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended
            if stat.parent.name != main and stat.read_text().rpartition(")")[2].split()[0] == "R":
                return True
    return False


def world_size() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
