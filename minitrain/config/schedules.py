"""Learning-rate schedules: the factor of the peak learning rate at each step.

Each schedule is a choice of `lr_scheduler` and appears in its help.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

DECAY_RATIO = 0.1  # the default of lr_decay_ratio


class Schedule(NamedTuple):
    """A schedule.

    Attributes:
        factor: (step, total, warmup, decay_ratio) -> the factor, for 0-based steps from `warmup` to `total`.
        help: What the learning rate does, for the help of `lr_scheduler`.
        decays: Whether the schedule uses decay_ratio.
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
    """Return the factor of the peak learning rate at the 0-based optimizer step.

    It rises over `warmup` steps, from 1/warmup at the first one, and then follows the schedule.

    Args:
        total: Number of optimizer steps of the run.
        name: A key of `SCHEDULES`.
        decay_ratio: Fraction of all steps in which a schedule with a decay phase decays; None for `DECAY_RATIO`.
    """
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[name].factor(step, total, warmup, DECAY_RATIO if decay_ratio is None else decay_ratio)


def _progress(step: int, total: int, warmup: int) -> float:
    """Return the fraction of the steps after the warmup that are done."""
    return min(1.0, (step - warmup) / max(1, total - warmup))


@schedule("linear", "decays linearly to 0")
def _linear(step: int, total: int, warmup: int, decay_ratio: float) -> float:
    return 1.0 - _progress(step, total, warmup)


@schedule("cosine", "decays to 0 along half a cosine")
def _cosine(step: int, total: int, warmup: int, decay_ratio: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * _progress(step, total, warmup)))


@schedule("constant", "stays at its peak")
def _constant(step: int, total: int, warmup: int, decay_ratio: float) -> float:
    return 1.0


@schedule("wsd", "stays at its peak, then decays linearly to 0 in the last steps (warmup-stable-decay)", decays=True)
def _wsd(step: int, total: int, warmup: int, decay_ratio: float) -> float:
    decay = min(round(decay_ratio * total), total - warmup)
    return min(1.0, max(0, total - step) / max(1, decay))
