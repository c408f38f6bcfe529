"""How a command ends that fails or is interrupted: one line on stderr, and an exit code."""

import contextlib
import errno
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minitrain.io.redact import redact

if TYPE_CHECKING:
    from minitrain.errors import MinitrainError

RANK_0_FIRST = 2.0  # seconds that the other ranks wait
STOPPED = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}
REDUCE_MEMORY = (
    "Use smaller batches (max_tokens_per_micro_batch, lower --batch-size or eval_batch_size) or shorter rows "
    "(max_length), or set activation_checkpointing=selective or full."
)


def fail(message: str, code: int) -> int:
    """Print an error, rank 0 before the others, and return the exit code."""
    rank, message = os.environ.get("RANK", "0"), redact(message)
    if rank != "0":
        # Usually rank 0 has the same error, and the launcher ends this process before it repeats it.
        time.sleep(RANK_0_FIRST)
        message = f"rank {rank}: {message}"
    print(f"minitrain: {message}", file=sys.stderr)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun prints a table of them
        with contextlib.suppress(OSError):
            more = {"py_callstack": message, "timestamp": str(int(time.time()))}
            Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": more}}))
    return code


def system_error(error: Exception) -> "MinitrainError | None":
    """Return the error for a file that the system refuses, or for exhausted memory; None for other exceptions."""
    from minitrain.errors import MinitrainError, RunError

    if isinstance(error, OSError):
        if not error.strerror:
            return None
        message = f"{redact(str(error.filename))[:80]}: {error.strerror}" if error.filename else error.strerror
        return RunError(message, "no-space") if error.errno == errno.ENOSPC else MinitrainError(message, "os-error")
    words = ("out of memory", "can't allocate memory")
    if isinstance(error, MemoryError) or any(one in str(error) for one in words):
        return RunError(f"out of memory. {REDUCE_MEMORY}", "out-of-memory")
    return None


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import heavy modules in this context: a signal ends the process at once, and no garbage is collected.

    While torch is imported, an exception would be lost or garbled, and collections, which free nothing there, take a
    tenth of the time.
    """

    def leave(number, frame):
        os._exit(fail(STOPPED[number], 128 + number))

    raising = [number for number in STOPPED if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, leave) for number in raising}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        for number, handler in before.items():
            signal.signal(number, handler)
