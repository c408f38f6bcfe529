"""When a checkpoint is due."""

import time

from minitrain.distributed.parallel import SingleDevice

MIN_INTERVAL = 60.0  # seconds between two checkpoints, at least
MAX_SHARE = 0.02  # of the time may go into writing them
WRITE_SPEED = 500e6  # bytes per second, assumed until one has been written


class SaveSchedule:
    """Every `save_every_steps` steps and at the end; if the option is not set, by time.

    By time, a checkpoint is due a minute after the last one, or later if writing one takes longer than 2 % of that: a
    run that is killed repeats at most a minute, or 50 times as long as a checkpoint takes.

    Attributes:
        count: Checkpoints written.
        seconds: The time that they took.
    """

    def __init__(self, every: int | None, n_bytes: int, parallel: SingleDevice):
        """
        Args:
            every: `save_every_steps`; 0: never, None: by time.
            n_bytes: The expected size of a checkpoint.
        """
        self.every, self.parallel = every, parallel
        self.cost = n_bytes / WRITE_SPEED  # seconds
        self.count, self.seconds = 0, 0.0
        self.start()

    def start(self) -> None:
        """The first step follows."""
        self.began = self.last = time.perf_counter()

    @property
    def interval(self) -> float:
        """Seconds between two checkpoints."""
        return max(MIN_INTERVAL, self.cost / MAX_SHARE)

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether a checkpoint is due after a step. All ranks call it, and get the same answer."""
        if self.every is not None:
            return self.every > 0 and (step % self.every == 0 or step == total_steps)
        waited = time.perf_counter() - self.last >= self.interval
        return self.parallel.max(int(waited)) > 0  # the clocks of ranks differ

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long."""
        self.count, self.seconds, self.cost = self.count + 1, self.seconds + seconds, seconds
        self.last = time.perf_counter()

    def failed(self) -> None:
        """A checkpoint could not be written; the next attempt is an interval later."""
        self.last = time.perf_counter()

    def summary(self) -> str:
        """What checkpoints have cost."""
        share = self.seconds / max(time.perf_counter() - self.began, 1e-9)
        return f"{self.count} checkpoint{'s' * (self.count != 1)} took {self.seconds:.1f} s ({share:.1%} of the time)"
