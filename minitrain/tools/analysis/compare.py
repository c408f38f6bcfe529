"""Find the first step at which two runs differ, from their ledgers and configs: `minitrain compare`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

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


Ledger = dict[int, LedgerStep]  # by step
NAMES = {"tokens": "tokens", "loss": "loss", "grad_norm": "gradient norm"}


class Difference(NamedTuple):
    """The first difference of a metric.

    Attributes:
        step: The step.
        a, b: The values there.
        relative_difference: The relative difference there; None for a hash.
        n_differing: Number of steps that differ.
        largest: The step with the largest relative difference, and that difference; None for a hash.
    """

    step: int
    a: str | float
    b: str | float
    relative_difference: float | None
    n_differing: int
    largest: tuple[int, float] | None


class Comparison(NamedTuple):
    """Where two runs first differ.

    Attributes:
        runs: The run directories.
        ledgers: Their steps.
        options: The values {"a": ..., "b": ...} of each option that differs, or a config that cannot be read.
        steps: The steps that both runs have.
        differences: The first difference of each metric that differs.
    """

    runs: tuple[Path, Path]
    ledgers: list[Ledger]
    options: dict[str, dict[str, Any]] | Path
    steps: list[int]
    differences: dict[str, Difference]

    def lines(self) -> list[str]:
        """Return the report."""
        named = zip("ab", self.runs, self.ledgers, strict=True)
        lines = [f"{name}: {folder}, {_span(ledger)}" for name, folder, ledger in named]
        lines += ["", *_option_lines(self.options), *_rewards(self.runs), ""]
        lines += [f"{NAMES[name]:<14} {_describe(self.differences.get(name), len(self.steps))}" for name in NAMES]
        return [*lines, "", _explain(self.differences, self.steps)]

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {
            "runs": list(map(str, self.runs)),
            "same": not self.differences,
            "common_steps": [self.steps[0], self.steps[-1]],
            "options": None if isinstance(self.options, Path) else self.options,
            "differences": {name: difference._asdict() for name, difference in self.differences.items()},
            "explanation": _explain(self.differences, self.steps),
        }


def compare(first: Path, second: Path) -> Comparison:
    """Compare two run directories.

    Raises:
        ConfigError: A directory has no ledger, or the runs have no step in common.
    """
    ledgers = [read_ledger(first), read_ledger(second)]
    steps = sorted(set(ledgers[0]) & set(ledgers[1]))
    if not steps:
        raise ConfigError(
            f"{first} and {second} have no step in common. Compare runs whose ledgers overlap.", "mismatch"
        )
    differences = {name: _find_difference(name, steps, *ledgers) for name in LedgerStep._fields}
    found = {name: difference for name, difference in differences.items() if difference is not None}
    return Comparison((first, second), ledgers, _options(first, second), steps, found)


def read_ledger(folder: Path) -> Ledger:
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


def _span(ledger: Ledger) -> str:
    return f"steps {min(ledger)} to {max(ledger)}"


def _options(first: Path, second: Path) -> dict[str, dict[str, Any]] | Path:
    """Return the values {"a": ..., "b": ...} of each option that differs, or a config that cannot be read."""
    configs = []
    for folder in (first, second):
        try:
            settings = read_settings(folder)
        except RunDirError:
            settings = None
        if settings is None:
            return folder / "config.yml"
        configs.append(dict(_flatten(resolve_aliases(settings, _loss_options))))
    a, b = configs
    keys = [
        key for key in (*a, *(key for key in b if key not in a)) if key not in RUN_OPTIONS and a.get(key) != b.get(key)
    ]
    return {key: {name: of_run[key] for name, of_run in (("a", a), ("b", b)) if key in of_run} for key in keys}


def _option_lines(options: dict[str, dict[str, Any]] | Path) -> list[str]:
    """Return a line for each option that differs."""
    if isinstance(options, Path):
        return [f"options: {options} cannot be read"]
    if not options:
        return ["options: the same"]
    width = max(map(len, options))
    lines = [f"  {key:<{width}}  {_format_option(o, 'a')} -> {_format_option(o, 'b')}" for key, o in options.items()]
    return ["options that differ:", *lines]


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


def _format_option(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name], default=str, skipkeys=True) if name in values else "(not set)"


def _find_difference(name: str, steps: list[int], a: Ledger, b: Ledger) -> Difference | None:
    """Return the first difference of a metric in these steps of two ledgers; None without one."""
    pairs = {step: (getattr(a[step], name), getattr(b[step], name)) for step in steps}
    pairs = {step: (x, y) for step, (x, y) in pairs.items() if x != y and not (x != x and y != y)}  # NaN is NaN
    if not pairs:
        return None
    first = next(iter(pairs))
    if name == "tokens":
        return Difference(first, *pairs[first], None, len(pairs), None)
    relative = {step: _relative_difference(*pair) for step, pair in pairs.items()}
    largest = max(relative, key=relative.get)
    return Difference(first, *pairs[first], relative[first], len(pairs), (largest, relative[largest]))


def _describe(difference: Difference | None, n_steps: int) -> str:
    """Return a line about a metric of two runs."""
    if difference is None:
        return f"bit-identical in {n_steps:,} steps"
    step, a, b, relative, n_differing, largest = difference
    if largest is None:
        return f"first differ at step {step}, and in {n_differing:,} of {n_steps:,} steps"
    line = f"first differs at step {step}: {a:.9g} and {b:.9g}, a relative difference of {relative:.1e}"
    return line if largest[0] == step else f"{line}; the largest is {largest[1]:.1e}, at step {largest[0]}"


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
