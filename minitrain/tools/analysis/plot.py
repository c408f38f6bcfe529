"""Plot the metrics of one or several runs: `minitrain plot`."""

import math
from collections.abc import Iterable
from pathlib import Path

from minitrain.errors import ConfigError
from minitrain.io.temp_files import new_file
from minitrain.training.metrics_log import History, Point

# Counters, times and options, whose curves are not useful.
LEFT_OUT = {"epoch", "tokens", "eta_seconds", "seconds", "dft_alpha"}
LAST = ("lr", "grad_norm", "tokens_per_second", "padding", "memory_gb")  # metrics of every loss, shown after its own
POSITIVE = ("loss", "perplexity", "kl", "grad_norm")  # suffixes of metrics that can have a logarithmic axis
TWO_DECADES = 100
FEW = 60  # largest number of points with markers
STYLES = {"train": {"linestyle": "-", "marker": "."}, "eval": {"linestyle": "--", "marker": "o"}}
PANEL = (4.2, 2.7)  # inches
NOTE = "Description"


def plot(histories: list[History], output: Path, force: bool = False, chosen: list[str] | None = None) -> None:
    """Write a PNG with a panel for each metric, with train and eval of all runs.

    Args:
        histories: The logs of the runs.
        output: The PNG file.
        force: Overwrite any file; without it only a plot of the same runs is overwritten.
        chosen: Names of the metrics; all by default.

    Raises:
        ConfigError: matplotlib is missing, no run has a metric, or `output` cannot be written or is another file.
    """
    figure = picture(histories, chosen)
    note = "minitrain plot of " + ", ".join(run_names(histories))
    if output.exists() and not force and _note(output) != note:
        raise ConfigError(f"--output: {output} exists and is no plot of these runs; choose another name or add --force")
    _save(figure, output, note)


def picture(histories: list[History], chosen: list[str] | None = None):
    """Return a matplotlib figure with a panel for each chosen metric, by default all. Raises ConfigError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plot: the package matplotlib is not installed: pip install minitrain[plot]") from None
    panels, colours = panels_of(histories), _colours(histories)
    if missing := set(chosen or []) - set(panels):
        told = f"no run has logged {', '.join(sorted(missing))}; there are {', '.join(panels)}"
        raise ConfigError(f"--figures: {told}")
    panels = chosen or panels
    columns = min(len(panels), 3 if len(panels) <= 9 else 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, name in zip(axes, panels):
        _draw(axis, name, histories, colours)
    for axis in axes[len(panels) :]:
        axis.remove()
    names = run_names(histories)
    shown = _legend(histories, names, colours)
    figure.legend(handles=shown, loc="outside upper left", ncols=2 * columns, frameon=False)
    if len(names) == 1:
        figure.suptitle(names[0], fontweight="bold")
    return figure


def run_names(histories: list[History]) -> list[str]:
    """Return the names of the run directories, or their paths if two have the same name."""
    names = [history.name for history in histories]
    return names if len(set(names)) == len(names) else [str(history.folder) for history in histories]


def panels_of(histories: Iterable[History]) -> list[str]:
    """Return the names of the metrics without train/ and eval/: the loss, its own metrics, those of every loss."""
    names = dict.fromkeys(name.partition("/")[2] for history in histories for name in history.figures)
    own = [name for name in names if name not in LEFT_OUT and name not in (*LAST, "loss")]
    return [name for name in ("loss", *own, *LAST) if name in names]


def wants_log(name: str, values: list[float]) -> bool:
    """Return whether a metric that cannot be negative spans more than two decades."""
    if not name.endswith(POSITIVE) or not values or min(values) <= 0:
        return False
    return max(values) / min(values) > TWO_DECADES


def _colours(histories: list[History]) -> list[dict[str, str]]:
    """Return the colors of train and eval curves of each run; with several runs, each run has one color."""
    if len(histories) == 1:
        return [{"train": "C0", "eval": "C1"}]
    return [dict.fromkeys(STYLES, f"C{number % 10}") for number in range(len(histories))]


def _draw(axis, name: str, histories: list[History], colours: list[dict[str, str]]) -> None:
    for history, colour in zip(histories, colours, strict=True):
        for kind, style in STYLES.items():
            points = history.figures.get(f"{kind}/{name}", [])
            _curve(axis, points, style | {"color": colour[kind]})
    values = [value for history in histories for kind in STYLES for value in history.values(f"{kind}/{name}")]
    if wants_log(name, values):
        axis.set_yscale("log")
    last = max(history.last_step for history in histories)
    axis.set_xlim(-0.02 * last, 1.02 * last or 1)
    axis.set_xlabel("step")
    axis.set_title(name, loc="left", fontsize=11, fontweight="bold")  # names the y-axis
    if name in LAST and axis.get_yscale() == "linear":
        axis.set_ylim(0, 1.08 * max(values, default=0) or 1)  # so that small changes look small
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _curve(axis, points: list[Point], style: dict) -> None:
    """Draw a line with a gap, and a cross at the bottom of the panel, where a value is infinite or undefined."""
    few = len(points) <= FEW
    style = style | {"marker": style["marker"] if few else "", "linewidth": 1.4 if few else 0.8}
    finite = [point.value if point.finite else math.nan for point in points]
    axis.plot([point.step for point in points], finite, markersize=4, **style)
    if gaps := [point.step for point in points if not point.finite]:
        foot = axis.get_xaxis_transform()
        axis.plot(gaps, [0.03] * len(gaps), linestyle="", marker="x", color=style["color"], transform=foot)


def _legend(histories: list[History], names: list[str], colours: list[dict[str, str]]) -> list:
    from matplotlib.lines import Line2D

    several = len(histories) > 1
    kinds = {kind for history in histories for kind in STYLES if any(n.startswith(kind) for n in history.figures)}
    shown = [Line2D([], [], color=colour["train"], label=name) for name, colour in zip(names, colours) if several]
    for kind in sorted(kinds, reverse=True):  # train before eval
        colour = "0.3" if several else colours[0][kind]
        shown.append(Line2D([], [], color=colour, label=kind, markersize=4, **STYLES[kind]))
    if any(not point.finite for history in histories for points in history.figures.values() for point in points):
        shown.append(Line2D([], [], color="0.3", linestyle="", marker="x", label="infinite or undefined"))
    return shown


def _note(file: Path) -> str | None:
    """Return the description that `plot` writes into its PNG files; None for any other file."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.info.get(NOTE)
    except OSError:
        return None


def _save(figure, output: Path, note: str) -> None:
    try:
        with new_file(output) as file:
            figure.savefig(file, format="png", dpi=120, metadata={NOTE: note})
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written: {error.strerror}") from None
