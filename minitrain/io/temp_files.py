"""Write files in temporary folders and rename them when they are complete; remove folders of killed processes.

Each process locks a file in its folder. The operating system releases the lock when the process ends for any reason.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .system import lock_file

PREFIX = ".building-"
LOCK = "lock"
MAX_SECONDS = 86_400  # age of an abandoned folder without a lock, on file systems that cannot lock


@contextlib.contextmanager
def new_file(path: Path, log: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` at the end of the context, unless there is an error.

    Args:
        path: The file.
        log: Receives a line for each removed folder of a killed process in the same directory.
    """
    with building_folder(path.parent, log) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextlib.contextmanager
def building_folder(parent: Path, log: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Yield a new folder in `parent` that is removed afterwards; first remove those of killed processes."""
    for folder in _remove_abandoned(parent):
        if log is not None:
            log(f"{folder}: removed, a killed process left it")
    with tempfile.TemporaryDirectory(dir=parent, prefix=PREFIX) as name:
        folder = Path(name)
        with open(folder / "locking", "w") as file:
            with contextlib.suppress(OSError):
                lock_file(file)
                os.rename(
                    folder / "locking", folder / LOCK
                )  # renamed once it is locked, so that other processes only see it locked
            yield folder


def _remove_abandoned(parent: Path) -> list[Path]:
    removed = []
    for folder in parent.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


def _is_abandoned(folder: Path) -> bool:
    try:
        with open(folder / LOCK, "r+") as file:
            lock_file(file)
    except FileNotFoundError:
        return folder.stat().st_mtime < time.time() - MAX_SECONDS
    except BlockingIOError:
        return False
    return True
