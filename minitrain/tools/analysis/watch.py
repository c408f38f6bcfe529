"""Draw the plot of runs again while they train: `minitrain plot --watch`."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from minitrain.errors import ConfigError
from minitrain.training.metrics_log import METRICS, SAMPLES, History, read_history

from .plot_html import is_finished

FILES = (METRICS, SAMPLES, "run.json")


def watch(folders: Sequence[Path], draw: Callable[[list[History], bool], None], seconds: float) -> None:
    """Draw when the logs of runs have changed, until all of them have finished.

    Args:
        draw: Receives the logs, and whether all runs have finished.
        seconds: Time between two looks at the logs.

    Raises:
        ConfigError: A folder does not exist, or the plot cannot be drawn.
    """
    drawn: list[tuple[int, int]] | None = None
    waiting: set[Path] = set()
    while True:
        state = [_state(folder / name) for folder in folders for name in FILES]
        histories = [_read(folder, waiting) for folder in folders] if state != drawn else []
        ready = [history for history in histories if history is not None]
        if ready and len(ready) == len(folders):
            finished = all(map(is_finished, ready))
            draw(ready, finished)
            drawn = state
            if finished:
                return
        time.sleep(seconds)


def _state(file: Path) -> tuple[int, int]:
    """Return the time and the size of a file, which change when it does."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _read(folder: Path, waiting: set[Path]) -> History | None:
    """Return the log of a run, or None if it has no metrics yet."""
    try:
        return read_history(folder)
    except ConfigError as error:
        if not folder.is_dir() or error.code not in ("not-found", "no-data"):
            raise
        if folder not in waiting:
            print(f"minitrain: waiting for the first metrics of {folder}", file=sys.stderr)
        waiting.add(folder)
        return None
