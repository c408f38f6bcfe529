"""Signals that stop a command: captured during training and checked between steps, raised before."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from minitrain.distributed.process import world_size
from minitrain.io.system import STOP_SIGNALS


@contextlib.contextmanager
def capture_signals(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Call `on_signal` with the number of each SIGINT, SIGTERM and SIGUSR1 inside the block.

    Does nothing outside the main thread, because Python handles signals only there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda number, frame: on_signal(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def announce(number: int) -> None:
    """Report a signal at once, since a step or a round can take long. Unlike `print`, it is safe in a handler."""
    with contextlib.suppress(OSError):  # stderr is closed, or has no reader
        os.write(2, f"{signal.Signals(number).name}: training stops at the next step and saves a checkpoint\n".encode())


class Interrupted(Exception):
    """A signal, which ends the sampling and judging of answers."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextlib.contextmanager
def sigterm_raised() -> Iterator[None]:
    """Raise Terminated on SIGTERM inside the block, and ignore further SIGTERMs during cleanup.

    With several ranks, SIGTERM keeps ending the process at once: a rank that waits in a collective runs no Python, and
    the launcher reports the signal. Does nothing if SIGTERM has a handler or is ignored, and outside the main thread.
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
