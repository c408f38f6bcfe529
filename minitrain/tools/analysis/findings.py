"""Findings about a run, and what the checks of `minitrain doctor` compute from its metrics."""

import math
from collections.abc import Callable
from statistics import fmean, pstdev
from typing import NamedTuple

from minitrain.training.metrics_log import History, Point

MIN_LINES = 6  # fewest lines from which a trend is derived
MAX_STEPS = 5  # most steps listed
FLAT = 0.02  # smallest relative change that counts
RISE = 0.3  # fraction of the gain, or of the loss, that a diverging run loses again


class Finding(NamedTuple):
    """What looks wrong, the evidence, and what to try."""

    problem: str
    evidence: str
    advice: str


class Check(NamedTuple):
    """A check of the metrics of a run.

    Attributes:
        code: The name of its finding; it stays when the wording changes.
        name: What is checked.
        find: Returns the finding, if there is one.
        requires: Metrics without which the check is skipped.
        skipped_with: A metric with which the check is skipped.
    """

    code: str
    name: str
    find: Callable[[History], Finding | None]
    requires: tuple[str, ...] = ()
    skipped_with: str = ""

    def applies(self, run: History) -> bool:
        return all(map(run.values, self.requires)) and self.skipped_with not in run.metrics


class Trend(NamedTuple):
    """The change of a metric over a run.

    Attributes:
        first: Mean at the start.
        last: Mean at the end.
        threshold: Smallest difference that is neither small nor noise.
    """

    first: float
    last: float
    threshold: float


def trend_of(values: list[float]) -> Trend:
    """Return the trend from the mean of the first third to that of the last; the noise excludes the first third."""
    third = max(len(values) // 3, 1)
    noise = pstdev(values[third:] or values) / math.sqrt(third)
    first, last = fmean(values[:third]), fmean(values[-third:])
    return Trend(first, last, max(FLAT * abs(first), 2 * noise))


def change(run: History, name: str) -> Trend:
    """Return the change from the first to the last evaluation, which has no noise, or the trend of a train metric."""
    values = run.values(name)
    return Trend(values[0], values[-1], FLAT * abs(values[0])) if name.startswith("eval/") else trend_of(values)


def format_steps(points: list[Point]) -> str:
    steps = ", ".join(str(point.step) for point in points[:MAX_STEPS])
    more = f" and {len(points) - MAX_STEPS} more" if len(points) > MAX_STEPS else ""
    return f"{'step' if len(points) == 1 else 'steps'} {steps}{more}"
