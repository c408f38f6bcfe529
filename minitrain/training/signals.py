"""Signals that ask a command to stop: noted while a model trains and looked at between steps, raised before."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from minitrain.distributed.process import world_size


@contextlib.contextmanager
def capture_signals(note: Callable[[int], None]) -> Iterator[None]:
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


class Terminated(KeyboardInterrupt):
    """SIGTERM came, and ends a command as Ctrl-C does."""


@contextlib.contextmanager
def sigterm_raised() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated where the command is; those that follow do nothing while it cleans up.

    Under a launcher of several ranks it ends the process at once: one that waits in a collective runs no Python, and
    the launcher reports the signal. Nothing changes where the process ignores or handles it, or in another thread.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not (world_size() == 1 and in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL):
        yield
        return

    def end(number, frame):
        signal.signal(number, lambda number, frame: None)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
