"""What a run has logged, read again from its folder.

Any of its files may be damaged: after a power failure, by a full disk, by hand.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

import yaml

from minitrain.errors import ConfigError, RunDirError

from .atomic_dir import replace_file

KINDS = ("train", "eval")
NOT_FIGURES = ("step", "kind")
LARGEST_STEP = 2**53  # beyond it a step is not a number that a float can hold
LARGEST = 1e100  # the squares of larger values cannot be summed
UNREADABLE = (OSError, ValueError, RecursionError, OverflowError, yaml.YAMLError)


class Point(NamedTuple):
    step: int
    value: float

    @property
    def finite(self) -> bool:
        return abs(self.value) < LARGEST


@dataclass
class History:
    """A run's figures as `train/NAME` and `eval/NAME`, each in the order in which it was logged."""

    folder: Path
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)  # messages about what cannot be read
    settings: dict | None = None  # config.yml; None when it cannot be read
    end: tuple[int, int] | None = None  # of a run that ended by itself: its last step, and the planned one

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        return max(points[-1].step for points in self.metrics.values())

    def setting(self, key: str, kind: type | UnionType) -> Any:
        """An option of config.yml (``a.b`` for one in a section); None when it is missing or not of this type."""
        value = self.settings
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, kind) else None

    def values(self, name: str) -> list[float]:
        """The finite values of a figure; [] when it was not logged."""
        return [point.value for point in self.metrics.get(name, []) if point.finite]

    def points(self, name: str) -> list[Point]:
        """The same with their steps."""
        return [point for point in self.metrics.get(name, []) if point.finite]


def read_history(folder: Path) -> History:
    """Read metrics.jsonl and, where they exist, config.yml and run.json. What is damaged is skipped and reported.

    Raises:
        ConfigError: The folder is not a run directory, or nothing was logged.
    """
    lines = read_lines(folder, "metrics.jsonl", ", so it is no run directory")
    history, damaged_lines = History(folder), []
    for number, line in enumerate(lines, 1):
        try:
            for name, point in _points(line).items():
                history.metrics.setdefault(name, []).append(point)
        except (*UNREADABLE, KeyError, TypeError):
            damaged_lines.append(number)
    if not history.metrics:
        reason = "holds no line that can be read" if damaged_lines else "holds no figures yet"
        raise ConfigError(f"{folder / 'metrics.jsonl'}: {reason}", "damaged-file" if damaged_lines else "no-data")
    if damaged_lines:
        history.damaged.append(damaged_lines_message(folder / "metrics.jsonl", damaged_lines) + " skipped")
    for name, read in (("settings", read_settings), ("end", read_end)):
        try:
            setattr(history, name, read(folder))
        except RunDirError as error:
            history.damaged.append(str(error))
    return history


def read_lines(folder: Path, name: str, otherwise: str) -> list[str]:
    """The lines of a file in a run directory. Raises ConfigError; `otherwise` is what it means that there is none."""
    file = folder / name
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; name a run directory, like runs/EXP_NAME", "not-found")
    if not file.is_file():
        raise ConfigError(f"{folder}: holds no {name}{otherwise}", "not-found")
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}", "unreadable") from None


def warn_damaged(messages: list[str]) -> None:
    """Print what cannot be read, on stderr."""
    for message in messages:
        print(f"minitrain: {message}", file=sys.stderr)


def damaged_lines_message(file: Path, numbers: list[int]) -> str:
    """``FILE:3, 5: lines that cannot be read are``, to be completed by what is done with them."""
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return (
        f"{file}:{shown}: {'a line that cannot be read is' if len(numbers) == 1 else 'lines that cannot be read are'}"
    )


def parse_line(line: str | bytes) -> dict:
    """A line of metrics.jsonl or ledger.jsonl. Raises ValueError when it is not an object with a step."""
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < LARGEST_STEP:
        raise ValueError("not an object with a step")
    return row


def last_steps(file: Path) -> dict[str | None, int]:
    """The largest step that a log holds of each kind of row; {} when there is none."""
    steps: dict[str | None, int] = {}
    for _, row in _rows(file):
        if row is not None:
            kind = row.get("kind") if row.get("kind") in KINDS else None
            steps[kind] = max(row["step"], steps.get(kind, 0))
    return steps


def last_step(file: Path) -> int:
    """The largest step that a log holds; 0 when there is none."""
    return max(last_steps(file).values(), default=0)


def truncate_log(file: Path, is_kept: Callable[[dict], bool]) -> list[int]:
    """Remove the rows of a log that are not kept, and those that cannot be read.

    Returns:
        The numbers of the lines that could not be read. The last one, if a kill cut it, is not among them.
    """
    damaged = []

    def kept() -> Iterator[bytes]:
        for number, (line, row) in enumerate(_rows(file), 1):
            if row is None:
                damaged.append(number)
            elif is_kept(row):
                yield line.rstrip(b"\n") + b"\n"

    replace_file(file, kept())
    return damaged


def _rows(file: Path) -> Iterator[tuple[bytes, dict | None]]:
    """The lines of a log and their rows; None for a line that cannot be read. One that a kill cut is left out."""
    with open(file, "rb") as lines:
        for line in lines:
            try:
                yield line, parse_line(line)
            except ValueError:
                if line.endswith(b"\n"):
                    yield line, None


def _points(line: str) -> dict[str, Point]:
    """Raises ValueError, TypeError or OverflowError for a line that is not one of `MetricLogger`."""
    row = parse_line(line)
    step, kind = row["step"], row.get("kind")
    if kind not in KINDS:
        raise ValueError
    return {f"{kind}/{name}": Point(step, float(value)) for name, value in row.items() if name not in NOT_FIGURES}


def read_settings(folder: Path) -> dict | None:
    """config.yml; None when there is none. Raises RunDirError when it is damaged."""
    file = folder / "config.yml"
    if not file.exists():
        return None
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UNREADABLE:
        settings = None
    if not isinstance(settings, dict):
        raise RunDirError(f"{file}: cannot be read as a config, so the options of this run are unknown", "damaged-file")
    return settings


def read_end(folder: Path) -> tuple[int, int] | None:
    """run.json: (the step at which the run ended by itself, its planned steps); None when there is none.

    Raises RunDirError when it is damaged.
    """
    file = folder / "run.json"
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        ended = content["finished_step"], content["total_steps"]
    except (*UNREADABLE, KeyError, TypeError):
        ended = ()
    if not ended or any(type(step) is not int or not 0 <= step < LARGEST_STEP for step in ended):
        raise RunDirError(f"{file}: is damaged, so whether the run has finished is unknown. Remove it", "damaged-file")
    return ended
