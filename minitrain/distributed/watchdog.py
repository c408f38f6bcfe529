"""Ends a run in which a rank hangs, and reports which one and where."""

import os
import sys
import threading
import time
import traceback

import torch.distributed as dist

from minitrain.io.redact import redact

GRACE_SECONDS = 3  # for the reports of the other ranks, before the launcher ends them


class Watchdog:
    """A thread that expects a heartbeat from its rank every `seconds`.

    Each rank counts its heartbeats, one before each collective, and writes the count to the store. After a timeout, the
    ranks with the lowest count are those that the others wait for. They print their stack, and all exit with status 1.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store, seconds: float):
        self.rank, self.world_size, self.store, self.seconds = rank, world_size, store, seconds
        self.status = "the start"
        self.beats, self.last = 0, 0.0
        self.main = threading.get_ident()
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        self.beat()
        self.ended.clear()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()

    def beat(self) -> None:
        self.beats += 1
        self.last = time.monotonic()

    def keep_alive(self, seconds: float = 0.0) -> None:
        self.last = max(self.last, time.monotonic() + seconds)

    def _watch(self) -> None:
        while not self.ended.wait(min(1.0, self.seconds / 4)):
            try:
                self.store.set(f"beats/{self.rank}", str(self.beats))
            except RuntimeError:  # the launcher has ended, and will end this process
                return
            if time.monotonic() - self.last > self.seconds:
                self._report()
                time.sleep(GRACE_SECONDS)
                os._exit(1)

    def _report(self) -> None:
        counts = [int(self.store.get(f"beats/{rank}")) for rank in range(self.world_size)]
        late = [rank for rank, count in enumerate(counts) if count == min(counts)]
        stuck = f"rank {self.rank}: no progress for {self.seconds:g} s in {redact(self.status)}"
        if self.rank not in late:
            print(f"{stuck}; it waits for rank {', '.join(map(str, late))}", file=sys.stderr, flush=True)
            return
        stack = "".join(traceback.format_stack(sys._current_frames()[self.main]))
        print(f"{stuck}; the others wait for this rank. Its stack:\n{stack}", file=sys.stderr, flush=True)
