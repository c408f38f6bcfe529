"""Calls that not every operating system has, with what is done instead.

On Windows, `fcntl`, `resource`, `os.fork` and most signals do not exist. All other code works the same everywhere.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import resource
except ImportError:
    resource = None

IS_WINDOWS = sys.platform == "win32"
RESERVED = r'[<>:"/\\|?*\0]|[. ]$' if IS_WINDOWS else r"[/\\\0]"  # in names of files
CAN_FORK = hasattr(os, "fork")
HAS_TIMER = hasattr(signal, "setitimer")
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # a run writes a checkpoint
LOCKED_BYTE = 1 << 30  # far behind the content, which other processes then can read


def lock_file(file: IO) -> None:
    """Lock an open file for this process. The operating system unlocks it when the process ends for any reason.

    Raises:
        BlockingIOError: Another process has locked it.
        OSError: The file system cannot lock.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    descriptor = file.fileno()
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(error.errno, error.strerror) from None
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk. Windows cannot flush folders, nor files that are open for reading only."""
    if IS_WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if IS_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within the context, raise TimeoutError after this time. Without limit on Windows and outside the main thread."""
    if not HAS_TIMER or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def peak_memory() -> int:
    """Return the peak memory of this process in bytes; 0 if the system does not report it."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory() -> int | None:
    """Return the memory of this machine in bytes; None if the system does not report it."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, whose output is not a terminal but shows progress."""
    return "ipykernel" in sys.modules
