"""Find the first step at which two runs differ, from their ledgers and configs: `minitrain compare`."""

import json
from pathlib import Path
from typing import NamedTuple

from minitrain.config.aliases import resolve_aliases
from minitrain.errors import ConfigError, RunDirError
from minitrain.training.metrics_log import (
    damaged_lines_message,
    parse_line,
    read_history,
    read_lines,
    read_settings,
    warn_damaged,
)

from .findings import trend_of

FILE = "ledger.jsonl"
RUN_OPTIONS = ("exp_name", "output_dir")  # always differ
ROUNDING = 1e-5  # largest relative difference of a float32 loss due to the order of sums


class LedgerStep(NamedTuple):
    """One line of a ledger: a hash of the tokens, the loss and the gradient norm."""

    tokens: str
    loss: float
    grad_norm: float


NAMES = {"tokens": "tokens", "loss": "loss", "grad_norm": "gradient norm"}


class Difference(NamedTuple):
    """The first difference of a metric.

    Attributes:
        step: The step.
        relative_difference: The relative difference there; None for a hash.
    """

    step: int
    relative_difference: float | None


def compare(first: Path, second: Path) -> tuple[list[str], bool]:
    """Compare two run directories.

    Returns:
        Lines about where the runs first differ, and whether all steps that both have are the same.

    Raises:
        ConfigError: A directory has no ledger, or the runs have no step in common.
    """
    ledgers = [read_ledger(first), read_ledger(second)]
    steps = sorted(set(ledgers[0]) & set(ledgers[1]))
    if not steps:
        raise ConfigError(
            f"{first} and {second} have no step in common. Compare runs whose ledgers overlap.", "mismatch"
        )
    a, b = ([ledger[step] for step in steps] for ledger in ledgers)
    lines = [f"{name}: {folder}, {_span(ledger)}" for name, folder, ledger in zip("ab", (first, second), ledgers)]
    lines += ["", *_options(first, second), *_rewards((first, second)), ""]
    differences = {}
    for name in LedgerStep._fields:
        sides = [[getattr(step, name) for step in steps_of] for steps_of in (a, b)]
        line, difference = _compare_metric(steps, *sides)
        lines.append(f"{NAMES[name]:<14} {line}")
        if difference is not None:
            differences[name] = difference
    return [*lines, "", _explain(differences, steps)], not differences


def read_ledger(folder: Path) -> dict[int, LedgerStep]:
    """Read the steps of a run; skip damaged lines with a warning on stderr. Raises ConfigError."""
    lines = read_lines(folder, FILE, "A run writes it unless ledger=false is set.")
    steps, damaged = {}, []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_line(line)
            steps[row["step"]] = LedgerStep(str(row["tokens"]), float(row["loss"]), float(row["grad_norm"]))
        except (ValueError, KeyError, TypeError, OverflowError):
            damaged.append(number)
    if damaged:
        warn_damaged([damaged_lines_message(folder / FILE, damaged) + " skipped"])
    if not steps:
        raise ConfigError(f"{folder / FILE}: contains no steps. Name a run that has logged one.", "no-data")
    return steps


def _span(ledger: dict[int, LedgerStep]) -> str:
    return f"steps {min(ledger)} to {max(ledger)}"


def _options(first: Path, second: Path) -> list[str]:
    """Return a line for each option that differs."""
    configs = []
    for folder in (first, second):
        try:
            settings = read_settings(folder)
        except RunDirError:
            settings = None
        if settings is None:
            return [f"options: {folder / 'config.yml'} cannot be read"]
        configs.append(dict(_flatten(resolve_aliases(settings, _loss_options))))
    a, b = configs
    keys = [
        key for key in (*a, *(key for key in b if key not in a)) if key not in RUN_OPTIONS and a.get(key) != b.get(key)
    ]
    if not keys:
        return ["options: the same"]
    width = max(map(len, keys))
    return [
        "options that differ:",
        *(f"  {key:<{width}}  {_format_option(a, key)} -> {_format_option(b, key)}" for key in keys),
    ]


def _rewards(folders: tuple[Path, Path]) -> list[str]:
    """Return a line with the rewards of two runs that sample answers."""
    parts = []
    for name, folder in zip("ab", folders, strict=True):
        try:
            rewards = read_history(folder).values("rollout/reward")
        except ConfigError:
            return []
        if not rewards:
            return []
        trend = trend_of(rewards)
        parts.append(f"{name} {trend.first:.4g} to {trend.last:.4g} in {len(rewards)} rounds")
    return [f"reward in the first and the last third: {'; '.join(parts)}"]


def _loss_options(name: str) -> type | None:
    from minitrain.losses import loss_options  # imports torch

    return loss_options(name)


def _flatten(settings, path: str = ""):
    """Yield (key, value) of each option; the key is ``a.b`` in a section."""
    if isinstance(settings, dict) and (settings or not path):
        for key, value in settings.items():
            yield from _flatten(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, settings


def _format_option(config: dict, key: str) -> str:
    return json.dumps(config[key], default=str, skipkeys=True) if key in config else "(not set)"


def _compare_metric(steps: list[int], a: list, b: list) -> tuple[str, Difference | None]:
    """Return a line about a metric of two runs, and its first difference."""
    differing = [i for i in range(len(steps)) if a[i] != b[i] and not (a[i] != a[i] and b[i] != b[i])]  # NaN is NaN
    if not differing:
        return f"bit-identical in {len(steps):,} steps", None
    first = differing[0]
    if isinstance(a[first], str):
        line = f"first differ at step {steps[first]}, and in {len(differing):,} of {len(steps):,} steps"
        return line, Difference(steps[first], None)
    relative_difference = {i: _relative_difference(a[i], b[i]) for i in differing}
    largest = max(differing, key=relative_difference.get)
    line = f"first differs at step {steps[first]}: {a[first]:.9g} and {b[first]:.9g}, "
    line += f"a relative difference of {relative_difference[first]:.1e}"
    if largest != first:
        line += f"; the largest is {relative_difference[largest]:.1e}, at step {steps[largest]}"
    return line, Difference(steps[first], relative_difference[first])


def _relative_difference(a: float, b: float) -> float:
    """Return the difference relative to the larger number; infinity if one is NaN."""
    ratio = abs(a - b) / max(abs(a), abs(b))
    return ratio if ratio == ratio else float("inf")


def _explain(differences: dict[str, Difference], steps: list[int]) -> str:
    """Return a sentence about what differed first, and its possible causes."""
    if not differences:
        return f"The runs are identical in all {len(steps):,} common steps."
    step = min(difference.step for difference in differences.values())
    first = [name for name, difference in differences.items() if difference.step == step]
    if "tokens" in first:
        return (
            f"From step {step} on the runs trained on different data: check seed, datasets, total_batch_size, the "
            "tokenizer, and the options that truncate or split examples."
        )
    small = all(differences[name].relative_difference < ROUNDING for name in first)
    size = "no more than rounding error" if small else "more than rounding error"
    if "loss" not in first:
        cause = "the backward pass: activation checkpointing, attention, micro-batches, another machine"
        return f"At step {step} the data and the loss are the same, but the gradient differs by {size}: check {cause}."
    if step == steps[0]:
        cause = "packing, micro-batches, ranks, attention, another machine" if small else "model, loss, dtype, dropout"
        return f"At step {step}, the first, the data is the same, but the loss differs by {size}: check {cause}."
    return (
        f"The runs are identical up to step {step - 1}. Then the loss differs by {size} on the same data: the update "
        f"of step {step - 1} or a random number differed. Check lr and its schedule, optimizer, max_grad_norm, dropout."
    )
