"""Signals that ask a training to stop: noted when they come, looked at between steps."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def signals_noted(note: Callable[[int], None]) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGUSR1 call `note` with their number, and do nothing else.

    Python handles signals in its main thread only, so in another one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, frame: note(number)) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
