"""Read the logs and options of a run from its directory.

Any file may be damaged: by a power failure, a full disk, or an edit.
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

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
KINDS = ("train", "eval", "rollout")
ROLLOUTS = "rollouts"  # the folder of sampled answers, with a file for each round
NOT_METRICS = ("step", "kind")
FEW_ENDED = 0.5  # fraction of ended answers below which a run and the doctor warn
LARGE_MISMATCH = 0.05  # of log-probabilities, per token, above which they do
LARGEST_STEP = 2**53  # a float represents integers exactly up to this one
LARGEST = 1e100  # the squares of larger values overflow
UNREADABLE = (OSError, ValueError, RecursionError, OverflowError, yaml.YAMLError)


class Point(NamedTuple):
    step: int
    value: float

    @property
    def finite(self) -> bool:
        return abs(self.value) < LARGEST


@dataclass
class History:
    """Metrics of a run by `train/NAME`, `eval/NAME` and `rollout/NAME`, in the order in which they were logged."""

    folder: Path
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)  # messages about unreadable files and lines
    settings: dict | None = None  # config.yml; None if it cannot be read
    end: tuple[int, int] | None = None  # of a finished run: last step and planned steps

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        return max(points[-1].step for points in self.metrics.values())

    def setting(self, key: str, expected: type | UnionType) -> Any:
        """Return an option of config.yml (``a.b`` in a section), or None if it is missing or of another type."""
        value = self.settings
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, expected) else None

    def values(self, name: str) -> list[float]:
        """Return the finite values of a metric, or [] if it was not logged."""
        return [point.value for point in self.metrics.get(name, []) if point.finite]

    def points(self, name: str) -> list[Point]:
        """Return the finite points of a metric, or [] if it was not logged."""
        return [point for point in self.metrics.get(name, []) if point.finite]


def read_history(folder: Path) -> History:
    """Read metrics.jsonl and, if they exist, config.yml and run.json. Skip damaged parts and report them in `damaged`.

    Raises:
        ConfigError: If the folder is not a run directory, or nothing was logged.
    """
    lines = read_lines(folder, METRICS, "Choose a run directory.")
    history, damaged_lines = History(folder), []
    for number, line in enumerate(lines, 1):
        try:
            for name, point in _points(line).items():
                history.metrics.setdefault(name, []).append(point)
        except (*UNREADABLE, KeyError, TypeError):
            damaged_lines.append(number)
    if not history.metrics:
        reason = "has no readable line." if damaged_lines else "has no metrics yet. Wait for the first log line."
        raise ConfigError(f"{folder / METRICS}: {reason}", "damaged-file" if damaged_lines else "no-data")
    if damaged_lines:
        history.damaged.append(damaged_lines_message(folder / METRICS, damaged_lines) + " skipped")
    for name, read in (("settings", read_settings), ("end", read_end)):
        try:
            setattr(history, name, read(folder))
        except RunDirError as error:
            history.damaged.append(str(error))
    return history


def check_exists(folder: Path) -> None:
    """Raise ConfigError if a run directory does not exist."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: does not exist. Choose a run directory, such as runs/EXP_NAME.", "not-found")


def read_lines(folder: Path, name: str, hint: str) -> list[str]:
    """Return the lines of a file in a run directory. Raise ConfigError, with `hint` if the file does not exist."""
    file = folder / name
    check_exists(folder)
    if not file.is_file():
        raise ConfigError(f"{folder}: does not contain {name}. {hint}", "not-found")
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}.", "unreadable") from None


def warn_damaged(messages: list[str]) -> None:
    """Print messages about unreadable files on stderr."""
    for message in messages:
        print(f"minitrain: {message}", file=sys.stderr)


def damaged_lines_message(file: Path, numbers: list[int]) -> str:
    """Return ``FILE:3, 5: unreadable lines are``, to be completed by what is done with them."""
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{file}:{shown}: {'an unreadable line is' if len(numbers) == 1 else 'unreadable lines are'}"


def parse_line(line: str | bytes) -> dict:
    """Parse a line of metrics.jsonl or ledger.jsonl. Raise ValueError if it is not an object with a step."""
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < LARGEST_STEP:
        raise ValueError("not an object with a step")
    return row


def last_steps(file: Path) -> dict[str | None, int]:
    """Return the largest step of each kind of row in a log."""
    steps: dict[str | None, int] = {}
    for _, row in _rows(file):
        if row is not None:
            kind = row.get("kind") if row.get("kind") in KINDS else None
            steps[kind] = max(row["step"], steps.get(kind, 0))
    return steps


def last_step(file: Path) -> int:
    """Return the largest step in a log, or 0."""
    return max(last_steps(file).values(), default=0)


def truncate_log(file: Path, is_kept: Callable[[dict], bool]) -> list[int]:
    """Remove the rows of a log that are not kept, and unreadable lines.

    Returns:
        The numbers of the unreadable lines, except a last line that a kill truncated.
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


def round_file(folder: Path, number: int) -> Path:
    """Return the file with the answers of a round, whose numbers start at 1."""
    return folder / ROLLOUTS / f"round-{number}.jsonl"


def drop_rounds(folder: Path, step: int) -> None:
    """Remove the answers of rounds that were sampled at a step or later."""
    for file in (folder / ROLLOUTS).glob("round-*.jsonl"):
        if last_step(file) >= step:
            file.unlink()


def _rows(file: Path) -> Iterator[tuple[bytes, dict | None]]:
    """Yield each line of a log with its row, or None for an unreadable line. Skip a last line that a kill truncated."""
    with open(file, "rb") as lines:
        for line in lines:
            try:
                yield line, parse_line(line)
            except ValueError:
                if line.endswith(b"\n"):
                    yield line, None


def _points(line: str) -> dict[str, Point]:
    """Return the points in a line of metrics.jsonl. Raise ValueError, TypeError or OverflowError for another line."""
    row = parse_line(line)
    step, kind = row["step"], row.get("kind")
    if kind not in KINDS:
        raise ValueError
    return {f"{kind}/{name}": Point(step, float(value)) for name, value in row.items() if name not in NOT_METRICS}


def read_settings(folder: Path) -> dict | None:
    """Return the content of config.yml, or None if it does not exist. Raise RunDirError if it is damaged."""
    file = folder / "config.yml"
    if not file.exists():
        return None
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UNREADABLE:
        settings = None
    if not isinstance(settings, dict):
        raise RunDirError(f"{file}: is not a readable config, so the options of this run are unknown", "damaged-file")
    return settings


def read_end(folder: Path) -> tuple[int, int] | None:
    """Return (last step, planned steps) of a finished run from run.json, or None if it does not exist.

    Raises:
        RunDirError: If run.json is damaged.
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
        raise RunDirError(
            f"{file}: is damaged, so it is unknown whether the run has finished. Remove it.", "damaged-file"
        )
    return ended
