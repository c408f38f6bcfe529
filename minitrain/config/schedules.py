"""Learning-rate schedules by name: the factor of the peak learning rate after the warm-up.

A schedule added here is a choice of `lr_scheduler`, and stands in the option's help.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

DECAY_RATIO = 0.1  # of wsd, when lr_decay_ratio is left out


class Schedule(NamedTuple):
    """A schedule.

    Args:
        factor: (step, total, warmup, decay_ratio) -> the factor, for a 0-based step from the warm-up to `total`.
        help: What it does, as the option's help says it.
        decays: Whether it uses decay_ratio.
    """

    factor: Callable[[int, int, int, float], float]
    help: str
    decays: bool = False


SCHEDULES: dict[str, Schedule] = {}


def schedule(name: str, help: str, *, decays: bool = False) -> Callable:
    """Register a function as the schedule `name`."""

    def register(factor: Callable) -> Callable:
        SCHEDULES[name] = Schedule(factor, help, decays)
        return factor

    return register


def lr_factor(step: int, total: int, warmup: int, name: str, decay_ratio: float | None = None) -> float:
    """Return what the peak learning rate is multiplied by at the 0-based optimizer step.

    It rises over `warmup` steps, the first of which has 1/warmup already, and then follows the schedule.

    Args:
        total: All optimizer steps of the run.
        name: A key of `SCHEDULES`.
        decay_ratio: Share of all steps in which a schedule with a decay phase falls; None for `DECAY_RATIO`.
    """
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[name].factor(step, total, warmup, DECAY_RATIO if decay_ratio is None else decay_ratio)


def _progress(step: int, total: int, warmup: int) -> float:
    """Return the share of the steps after the warm-up that are done."""
    return min(1.0, (step - warmup) / max(1, total - warmup))


@schedule("linear", "falls in a line to 0")
def _linear(step: int, total: int, warmup: int, decay_ratio: float) -> float:
    return 1.0 - _progress(step, total, warmup)


@schedule("cosine", "falls as half a cosine to 0")
def _cosine(step: int, total: int, warmup: int, decay_ratio: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * _progress(step, total, warmup)))


@schedule("constant", "stays at its peak")
def _constant(step: int, total: int, warmup: int, decay_ratio: float) -> float:
    return 1.0


@schedule("wsd", "stays at its peak, and falls in a line to 0 in the last steps (warmup-stable-decay)", decays=True)
def _wsd(step: int, total: int, warmup: int, decay_ratio: float) -> float:
    decay = min(round(decay_ratio * total), total - warmup)
    return min(1.0, max(0, total - step) / max(1, decay))
