"""Learning-rate schedules: the factor of the peak learning rate at each step.

Each schedule is a choice of `lr_scheduler` and appears in its help. Its keyword-only parameters are the keys of
`lr_scheduler_args`, named as in transformers.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from minitrain.errors import short

DECAY_RATIO = 0.1  # the default of lr_decay_ratio
# The smallest and the largest value of each number, and the choices of each string.
BOUNDS = {
    "num_cycles": (0.0, 1e6),
    "min_lr": (0.0, math.inf),  # and at most lr
    "min_lr_rate": (0.0, 1.0),
    "min_lr_ratio": (0.0, 1.0),
    "lr_end": (0.0, math.inf),  # and at most lr
    "power": (0.0, 1e3),
    "timescale": (1, 1e9),
    "num_decay_steps": (0, 1e9),
}
CHOICES = {"decay_type": ("linear", "cosine", "1-sqrt")}
RATES = ("min_lr", "lr_end")  # learning rates, not factors


class Point(NamedTuple):
    """A step of a schedule after the warmup.

    Attributes:
        step: The 0-based step.
        total: Number of steps of the run.
        warmup: Number of warmup steps.
        decay_ratio: Fraction of all steps in which a schedule with a decay phase decays.
        peak: The peak learning rate.
    """

    step: int
    total: int
    warmup: int
    decay_ratio: float
    peak: float

    @property
    def progress(self) -> float:
        """Return the fraction of the steps after the warmup that are done."""
        return min(1.0, (self.step - self.warmup) / max(1, self.total - self.warmup))


class Schedule(NamedTuple):
    """A schedule.

    Attributes:
        factor: (point, **arguments) -> the factor.
        help: What the learning rate does, for the help of `lr_scheduler`.
        decays: Whether the schedule uses decay_ratio.
    """

    factor: Callable[..., float]
    help: str
    decays: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the schedule with their defaults."""
        parameters = inspect.signature(self.factor).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


SCHEDULES: dict[str, Schedule] = {}


def schedule(name: str, help: str, *, decays: bool = False) -> Callable:
    """Register a function as the schedule `name`."""

    def register(factor: Callable) -> Callable:
        SCHEDULES[name] = Schedule(factor, help, decays)
        return factor

    return register


def lr_factor(
    step: int,
    total: int,
    warmup: int,
    name: str,
    decay_ratio: float | None = None,
    arguments: Mapping[str, Any] | None = None,
    peak: float = 1.0,
) -> float:
    """Return the factor of the peak learning rate at the 0-based optimizer step.

    It rises over `warmup` steps, from 1/warmup at the first one, and then follows the schedule.

    Args:
        total: Number of optimizer steps of the run.
        name: A key of `SCHEDULES`.
        decay_ratio: Fraction of all steps in which a schedule with a decay phase decays; None for `DECAY_RATIO`.
        arguments: Arguments of the schedule.
        peak: The peak learning rate, for arguments that are learning rates.
    """
    if step < warmup:
        return (step + 1) / warmup
    point = Point(step, total, warmup, DECAY_RATIO if decay_ratio is None else decay_ratio, peak)
    return SCHEDULES[name].factor(point, **(arguments or {}))


def argument_problems(name: str, arguments: Mapping[str, Any], peak: float) -> Iterator[tuple[str, str, str]]:
    """Yield (argument, error code, message) for each argument that the schedule cannot use; "" is all of them."""
    known = SCHEDULES[name].arguments
    for key, value in (known | arguments).items():
        if key not in known:
            advice = f"Use one of {', '.join(known)}." if known else "Remove it."
            yield key, "unknown-option", f"unknown argument of {name}. {advice}"
        elif value is None and known[key] is None:
            continue
        elif key in CHOICES:
            if value not in CHOICES[key]:
                yield key, "not-a-choice", f"expected one of {', '.join(CHOICES[key])}, got {short(value)!r}."
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            yield key, "wrong-type", f"expected a number, got {short(value)!r}. Correct it."
        elif not BOUNDS[key][0] <= value <= (peak if key in RATES else BOUNDS[key][1]):
            highest = f"lr={peak:g}" if key in RATES else f"{BOUNDS[key][1]:g}"
            yield key, "out-of-range", f"expected {BOUNDS[key][0]:g} to {highest}, got {value}. Correct it."
    if name == "wsd" and "num_cycles" in arguments and arguments.get("decay_type") != "cosine":
        yield "num_cycles", "no-effect", "has no effect without decay_type=cosine. Remove it."
    if name == "cosine_with_min_lr" and sum(arguments.get(key) is not None for key in ("min_lr", "min_lr_rate")) != 1:
        yield "", "missing-option", "cosine_with_min_lr needs one of min_lr and min_lr_rate. Set one, and only one."


def _cosine_wave(progress: float, num_cycles: float, floor: float = 0.0) -> float:
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))


def _share(rate: float, peak: float) -> float:
    """Return a learning rate as a fraction of the peak."""
    return rate / peak if peak else 0.0


@schedule("linear", "decays linearly to 0")
def _linear(at: Point) -> float:
    return 1.0 - at.progress


@schedule("cosine", "decays to 0 along half a cosine; {num_cycles: 0.5}")
def _cosine(at: Point, *, num_cycles: float = 0.5) -> float:
    return _cosine_wave(at.progress, num_cycles)


@schedule(
    "cosine_with_min_lr",
    "decays along half a cosine to min_lr, or to min_lr_rate times the peak; {min_lr or min_lr_rate, num_cycles: 0.5}",
)
def _cosine_with_min_lr(
    at: Point, *, min_lr: float | None = None, min_lr_rate: float | None = None, num_cycles: float = 0.5
) -> float:
    return _cosine_wave(at.progress, num_cycles, _share(min_lr, at.peak) if min_lr_rate is None else min_lr_rate)


@schedule("cosine_with_restarts", "decays to 0 num_cycles times along half a cosine; {num_cycles: 1}")
def _cosine_with_restarts(at: Point, *, num_cycles: float = 1) -> float:
    return _cosine_wave(num_cycles * at.progress % 1.0, 0.5) if at.progress < 1.0 else 0.0


@schedule("polynomial", "decays to lr_end with a power of the remaining steps; {lr_end: 1e-7, power: 1.0}")
def _polynomial(at: Point, *, lr_end: float = 1e-7, power: float = 1.0) -> float:
    end = _share(lr_end, at.peak)
    return (1.0 - end) * (1.0 - at.progress) ** power + end


@schedule(
    "inverse_sqrt",
    "decays with the square root of the step; {timescale: the number of warmup steps, or 10,000 without warmup}",
)
def _inverse_sqrt(at: Point, *, timescale: int | None = None) -> float:
    timescale = timescale or at.warmup or 10_000
    return math.sqrt(timescale / (at.step - at.warmup + timescale))


@schedule("constant", "stays at its peak")
def _constant(at: Point) -> float:
    return 1.0


@schedule(
    "wsd",
    "stays at its peak, then decays to min_lr_ratio times the peak in the last steps (warmup-stable-decay); "
    "{decay_type: linear, cosine or 1-sqrt, min_lr_ratio: 0, num_decay_steps: by lr_decay_ratio, num_cycles: 0.5}",
    decays=True,
)
def _wsd(
    at: Point,
    *,
    decay_type: str = "linear",
    min_lr_ratio: float = 0.0,
    num_decay_steps: int | None = None,
    num_cycles: float = 0.5,
) -> float:
    decay = round(at.decay_ratio * at.total) if num_decay_steps is None else num_decay_steps
    decay = min(decay, at.total - at.warmup)
    remaining = min(1.0, max(0, at.total - at.step) / max(1, decay))
    if decay_type == "cosine":
        remaining = _cosine_wave(1.0 - remaining, num_cycles)
    elif decay_type == "1-sqrt":
        remaining = 1.0 - math.sqrt(1.0 - remaining)
    return min_lr_ratio + (1.0 - min_lr_ratio) * remaining
