"""What a run has logged, read again from its folder."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from .errors import ConfigError

NOT_FIGURES = ("step", "kind")


class Point(NamedTuple):
    step: int
    value: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.value)


@dataclass
class History:
    """A run's figures as `train/NAME` and `eval/NAME`, each in the order in which it was logged."""

    folder: Path
    figures: dict[str, list[Point]] = field(default_factory=dict)
    broken: list[int] = field(default_factory=list)  # numbers of the lines that cannot be read
    settings: dict = field(default_factory=dict)  # config.yml; {} when it cannot be read
    finished: int | None = None  # the step at which the run ended by itself

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        return max(points[-1].step for points in self.figures.values())

    def values(self, name: str) -> list[float]:
        """The finite values of a figure; [] when it was not logged."""
        return [point.value for point in self.figures.get(name, []) if point.finite]

    def points(self, name: str) -> list[Point]:
        """The same with their steps."""
        return [point for point in self.figures.get(name, []) if point.finite]


def read_history(folder: Path) -> History:
    """Reads metrics.jsonl and, when they are there, config.yml and run.json. A broken line is skipped and noted.

    Raises ConfigError for a folder that is no run, or in which nothing was logged.
    """
    lines = read_lines(folder, "metrics.jsonl", ", so it is no run folder")
    history = History(folder, settings=read_settings(folder), finished=_finished(folder))
    for number, line in enumerate(lines, 1):
        try:
            for name, point in _points(line).items():
                history.figures.setdefault(name, []).append(point)
        except (ValueError, KeyError, TypeError, OverflowError):
            history.broken.append(number)
    if not history.figures:
        raise ConfigError(f"{folder / 'metrics.jsonl'}: holds no figures yet")
    return history


def read_lines(folder: Path, name: str, otherwise: str) -> list[str]:
    """The lines of a file in a run folder. Raises ConfigError; `otherwise` is what it means that there is none."""
    file = folder / name
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; name a run folder, like runs/EXP_NAME")
    if not file.is_file():
        raise ConfigError(f"{folder}: holds no {name}{otherwise}")
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


def tell_broken(history: History) -> None:
    """A warning on stderr about the lines that were skipped, if any."""
    if history.broken:
        shown = ", ".join(map(str, history.broken[:5])) + (", ..." if len(history.broken) > 5 else "")
        lines = "a line that cannot be read is" if len(history.broken) == 1 else "lines that cannot be read are"
        print(f"minitrain: {history.folder / 'metrics.jsonl'}:{shown}: {lines} skipped", file=sys.stderr)


def _points(line: str) -> dict[str, Point]:
    """Raises ValueError, KeyError, TypeError or OverflowError for a line that is not one of `Tracking`."""
    row = json.loads(line)
    step, kind = row["step"], row["kind"]
    if type(step) is not int or kind not in ("train", "eval"):
        raise ValueError
    return {f"{kind}/{name}": Point(step, float(value)) for name, value in row.items() if name not in NOT_FIGURES}


def read_settings(folder: Path) -> dict:
    """config.yml; {} when it cannot be read."""
    try:
        settings = yaml.safe_load((folder / "config.yml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _finished(folder: Path) -> int | None:
    try:
        step = json.loads((folder / "run.json").read_text(encoding="utf-8"))["finished_step"]
        return step if type(step) is int else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
