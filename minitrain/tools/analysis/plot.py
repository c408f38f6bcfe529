"""Plot the metrics of one or several runs: `minitrain plot`."""

import math
from collections.abc import Iterable
from pathlib import Path

from minitrain.errors import ConfigError, write_error_code
from minitrain.io.temp_files import new_file
from minitrain.training.metrics_log import History, Point

# Counters, times and options, whose curves are not useful.
EXCLUDED = {"epoch", "tokens", "eta_seconds", "seconds", "dft_alpha", "round", "drawn"}
# Metrics of sampled answers, or what their names begin with, in the order of the panels.
OF_ANSWERS = ("reward", "reward/", "pass@", "solved", "failed", "zero_variance", "ended", "length", "kl", "entropy")
# Metrics of every loss, shown after its own.
COMMON = ("lr", "grad_norm", "tokens_per_second", "mfu", "padding", "memory_gb")
POSITIVE = ("loss", "perplexity", "kl", "grad_norm")  # suffixes of metrics that can have a logarithmic axis
TWO_DECADES = 100
MAX_MARKERS = 60  # largest number of points with markers
STYLES = {
    "train": {"linestyle": "-", "marker": "."},
    "rollout": {"linestyle": "-", "marker": "."},
    "eval": {"linestyle": "--", "marker": "o"},
}
PANEL = (4.2, 2.7)  # inches
DESCRIPTION_KEY = "Description"


def plot(histories: list[History], output: Path, force: bool = False, metrics: list[str] | None = None) -> None:
    """Write a PNG with a panel for each metric, with train and eval of all runs.

    Args:
        histories: The logs of the runs.
        output: The PNG file.
        force: Overwrite any file; without it only a plot of the same runs is overwritten.
        metrics: Names of the metrics; all by default.

    Raises:
        ConfigError: matplotlib is missing, no run has a metric, or `output` cannot be written or is another file.
    """
    figure, description = make_figure(histories, metrics), describe_runs(histories)
    if output.exists() and not force and _read_description(output) != description:
        raise ConfigError(
            f"--output: {output} already exists and is not a plot of these runs. Choose another name or add --force.",
            "already-exists",
        )
    _save(figure, output, description)


def make_figure(histories: list[History], metrics: list[str] | None = None):
    """Return a matplotlib figure with a panel for each metric, by default all. Raise ConfigError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "plot: matplotlib is not installed. Run `pip install minitrain[plot]`.", "not-installed"
        ) from None
    panels, colors = panel_names(histories), _colors(histories)
    if missing := set(metrics or []) - set(panels):
        message = f"no run has logged {', '.join(sorted(missing))}. Choose from {', '.join(panels)}."
        raise ConfigError(f"--metrics: {message}", "not-a-choice")
    panels = metrics or panels
    columns = min(len(panels), 3 if len(panels) <= 9 else 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, name in zip(axes, panels):
        _draw(axis, name, histories, colors)
    for axis in axes[len(panels) :]:
        axis.remove()
    names = run_names(histories)
    handles = _legend(histories, names, colors)
    figure.legend(handles=handles, loc="outside upper left", ncols=2 * columns, frameon=False)
    if len(names) == 1:
        figure.suptitle(names[0], fontweight="bold")
    return figure


def describe_runs(histories: list[History]) -> str:
    """Return what marks a file as a plot of these runs."""
    return "minitrain plot of " + ", ".join(run_names(histories))


def run_names(histories: list[History]) -> list[str]:
    """Return the names of the run directories, or their paths if two have the same name."""
    names = [history.name for history in histories]
    return names if len(set(names)) == len(names) else [str(history.folder) for history in histories]


def panel_names(histories: Iterable[History]) -> list[str]:
    """Return the names of the metrics without their kind: the loss, its own metrics, those of every loss.

    In runs that sample answers, those of the answers come first. Others that are always 0 are left out, and the
    result of the only reward function, which is the reward.
    """
    names = dict.fromkeys(name.partition("/")[2] for history in histories for name in history.metrics)
    specific = [name for name in names if name not in EXCLUDED and name not in (*COMMON, "loss")]
    specific = [name for name in specific if not name.startswith("seconds/")]
    if not any(name.startswith("rollout/") for history in histories for name in history.metrics):
        return [name for name in ("loss", *specific, *COMMON) if name in names]
    rewards = _all_values(histories, "reward", ("rollout", "eval"))
    specific = [n for n in specific if not n.startswith("reward/") or _all_values(histories, n) != rewards]
    first = [name for start in OF_ANSWERS for name in specific if name == start or name.startswith(_prefix(start))]
    others = [name for name in specific if name not in first and any(_all_values(histories, name))]
    return [name for name in (*dict.fromkeys(first), *others, "loss", *COMMON) if name in names]


def _prefix(start: str) -> tuple[str, ...]:
    return (start,) if start.endswith(("/", "@")) else ()


def _all_values(histories: Iterable[History], name: str, kinds: Iterable[str] = tuple(STYLES)) -> list[float]:
    return [value for history in histories for kind in kinds for value in history.values(f"{kind}/{name}")]


def uses_log_scale(name: str, values: list[float]) -> bool:
    """Return whether a metric that cannot be negative spans more than two decades."""
    if not name.endswith(POSITIVE) or not values or min(values) <= 0:
        return False
    return max(values) / min(values) > TWO_DECADES


def _colors(histories: list[History]) -> list[dict[str, str]]:
    """Return the colors of the curves of each run; with several runs, each run has one color."""
    if len(histories) == 1:
        return [{"train": "C0", "eval": "C1", "rollout": "C2"}]
    return [dict.fromkeys(STYLES, f"C{number % 10}") for number in range(len(histories))]


def _draw(axis, name: str, histories: list[History], colors: list[dict[str, str]]) -> None:
    for history, color in zip(histories, colors, strict=True):
        for split, style in STYLES.items():
            points = history.metrics.get(f"{split}/{name}", [])
            same_answers = split == "train" and name == "reward" and "rollout/reward" in history.metrics
            if points and not same_answers:
                _curve(axis, points, style | {"color": color[split]})
    values = _all_values(histories, name)
    if uses_log_scale(name, values):
        axis.set_yscale("log")
    last = max(history.last_step for history in histories)
    axis.set_xlim(-0.02 * last, 1.02 * last or 1)
    axis.set_xlabel("step")
    axis.set_title(name, loc="left", fontsize=11, fontweight="bold")  # names the y-axis
    if name in COMMON and axis.get_yscale() == "linear":
        axis.set_ylim(0, 1.08 * max(values, default=0) or 1)  # so that small changes look small
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _curve(axis, points: list[Point], style: dict) -> None:
    """Draw a line with a gap, and a cross at the bottom of the panel, where a value is infinite or undefined."""
    has_markers = len(points) <= MAX_MARKERS
    style = style | {"marker": style["marker"] if has_markers else "", "linewidth": 1.4 if has_markers else 0.8}
    finite = [point.value if point.finite else math.nan for point in points]
    axis.plot([point.step for point in points], finite, markersize=4, **style)
    if gaps := [point.step for point in points if not point.finite]:
        transform = axis.get_xaxis_transform()
        axis.plot(gaps, [0.03] * len(gaps), linestyle="", marker="x", color=style["color"], transform=transform)


def _legend(histories: list[History], names: list[str], colors: list[dict[str, str]]) -> list:
    from matplotlib.lines import Line2D

    several = len(histories) > 1
    splits = {split for history in histories for split in STYLES if any(n.startswith(split) for n in history.metrics)}
    handles = [Line2D([], [], color=color["train"], label=name) for name, color in zip(names, colors) if several]
    for split in sorted(splits, reverse=True):  # train, rollout, eval
        color = "0.3" if several else colors[0][split]
        handles.append(Line2D([], [], color=color, label=split, markersize=4, **STYLES[split]))
    if any(not point.finite for history in histories for points in history.metrics.values() for point in points):
        handles.append(Line2D([], [], color="0.3", linestyle="", marker="x", label="infinite or undefined"))
    return handles


def _read_description(file: Path) -> str | None:
    """Return the description that `plot` writes into its PNG files; None for any other file."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.info.get(DESCRIPTION_KEY)
    except OSError:
        return None


def _save(figure, output: Path, description: str) -> None:
    try:
        with new_file(output) as file:
            figure.savefig(file, format="png", dpi=120, metadata={DESCRIPTION_KEY: description})
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written: {error.strerror}", write_error_code(error)) from None
