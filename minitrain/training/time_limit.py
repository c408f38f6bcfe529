"""The time limit of a run, `max_minutes`."""

import time
from collections import deque

TIMEOUT = 14  # stops a run as a signal does; the number of SIGALRM, which not every system has
N_RECENT = 100  # steps: the first one may compile, and a round is sampled before one of several steps

clock = time.perf_counter


class TimeLimit:
    """The clock of a run, and how long its steps take: data, rounds, hooks, but neither evaluations nor checkpoints."""

    def __init__(self, minutes: float | None):
        """
        Args:
            minutes: `max_minutes`. The clock starts now, before data and models are loaded.
        """
        self.minutes, self.has_trained = minutes, False
        self.began = self.last = clock()
        self.step_seconds: deque[float] = deque(maxlen=N_RECENT)

    def start_training(self) -> None:
        """Start the clock again, unless this is the first training of the process."""
        if self.has_trained:
            self.began = clock()
        self.has_trained = True

    def start_loop(self) -> None:
        self.last = clock()

    def start_step(self) -> None:
        """Record that a step begins, which ends the one before."""
        now = clock()
        self.step_seconds.append(now - self.last)
        self.last = now

    def leave_out(self, seconds: float) -> None:
        """Leave out an evaluation or a checkpoint from the time of the current step."""
        self.last += seconds

    @property
    def longest_step(self) -> float:
        """Return the time of the longest recent step, in seconds."""
        return max(self.step_seconds, default=0.0)

    def is_up(self, seconds: float) -> bool:
        """Return whether something that takes this long would end too late."""
        return self.minutes is not None and clock() + seconds > self.began + 60 * self.minutes
