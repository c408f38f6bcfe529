"""Ends a run in which a rank hangs, and says which one and where."""

import os
import sys
import threading
import time
import traceback

import torch.distributed as dist

from minitrain.io.redact import redact

GRACE_SECONDS = 3  # in which the others report before the launcher ends them


class Watchdog:
    """A thread that expects a beat from its rank every `seconds`.

    Each rank counts its beats, one before each collective, and puts the count into the store. When a rank waits in
    vain, those with the lowest count are the ones waited for: they print their stack, and all leave with status 1.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store, seconds: float):
        self.rank, self.world_size, self.store, self.seconds = rank, world_size, store, seconds
        self.place = "the start"
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

    def _watch(self) -> None:
        while not self.ended.wait(min(1.0, self.seconds / 4)):
            try:
                self.store.set(f"beats/{self.rank}", str(self.beats))
            except RuntimeError:  # the launcher is gone, and so will be this process
                return
            if time.monotonic() - self.last > self.seconds:
                self._report()
                time.sleep(GRACE_SECONDS)
                os._exit(1)

    def _report(self) -> None:
        counts = [int(self.store.get(f"beats/{rank}")) for rank in range(self.world_size)]
        late = [rank for rank, count in enumerate(counts) if count == min(counts)]
        stuck = f"rank {self.rank}: nothing has moved for {self.seconds:g} s, at {redact(self.place)}"
        if self.rank not in late:
            print(f"{stuck}; it waits for rank {', '.join(map(str, late))}", file=sys.stderr, flush=True)
            return
        stack = "".join(traceback.format_stack(sys._current_frames()[self.main]))
        print(f"{stuck}; the others wait for this rank, which is here:\n{stack}", file=sys.stderr, flush=True)
