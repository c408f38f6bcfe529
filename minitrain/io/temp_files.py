"""Folders in which files are made before they take their place, and what killed processes left of them.

Each process holds a lock on a file in its folder, which the system releases however the process ends.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PREFIX = ".building-"
LOCK = "lock"
MAX_SECONDS = 86_400  # that a folder without a lock may be at work, where files cannot be locked


@contextlib.contextmanager
def new_file(path: Path, say: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Yield where to write a file, which takes its place when the block ends well, and not at all after an error.

    Args:
        say: Gets a line for each folder that a killed process left beside it, which is removed.
    """
    with building_folder(path.parent, say) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextlib.contextmanager
def building_folder(parent: Path, say: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Yield a new folder in `parent` that is removed afterwards, and remove those that killed processes left there."""
    for folder in _remove_abandoned(parent):
        if say is not None:
            say(f"{folder}: removed; a killed process had left it")
    with tempfile.TemporaryDirectory(dir=parent, prefix=PREFIX) as name:
        folder = Path(name)
        with open(folder / "locking", "w") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
                os.rename(folder / "locking", folder / LOCK)  # so that no other process sees it before it is locked
            yield folder


def _remove_abandoned(parent: Path) -> list[Path]:
    removed = []
    for folder in parent.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):  # another process removes it, too
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


def _is_abandoned(folder: Path) -> bool:
    try:
        with open(folder / LOCK, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return folder.stat().st_mtime < time.time() - MAX_SECONDS
    except BlockingIOError:
        return False
    return True
