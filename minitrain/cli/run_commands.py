"""Commands that read the logs of runs, without torch."""

import argparse
from pathlib import Path

from minitrain.errors import ConfigError

from .arguments import add_quiet
from .output import new_output, print_info
from .registry import command


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; several share the panels")
    parser.add_argument(
        "--output", metavar="FILE.png", help="default: RUN/metrics.png, or metrics.png for several runs"
    )
    about = "plot only these metrics, in this order, for example loss lr"
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help=about)
    parser.add_argument("--figures", nargs="+", dest="metrics", help=argparse.SUPPRESS)  # the name in 0.1.0
    parser.add_argument("--force", action="store_true", help="overwrite a file that is not a plot of these runs")
    add_quiet(parser)


@command(
    _plot_arguments,
    "plot the metrics of runs",
    usage="RUN [RUN ...] [--metrics NAME ...] [--output FILE.png]",
    example="minitrain plot runs/quickstart-sft runs/warmer --output runs/metrics.png",
    docs="metrics.md#looking-at-a-run",
)
def plot(arguments: argparse.Namespace) -> int:
    from minitrain.tools.analysis.plot import plot
    from minitrain.training.metrics_log import read_history, warn_damaged

    histories = [read_history(Path(run)) for run in arguments.runs]
    for history in histories:
        warn_damaged(history.damaged)
    folder = Path(arguments.runs[0]) if len(histories) == 1 else Path()
    output = new_output(arguments.output or str(folder / "metrics.png"), force=True)  # `plot` recognizes its own files
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output: expected a .png file, got {output}. Rename the output.", "wrong-format")
    plot(histories, output, arguments.force, arguments.metrics)
    print_info(arguments, f"plot saved to {output}")
    return 0


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory; the run may still be in progress")


@command(
    _doctor_arguments,
    "diagnose common problems in a run",
    usage="RUN",
    example="minitrain doctor runs/quickstart-sft",
    docs="metrics.md#looking-at-a-run",
)
def doctor(arguments: argparse.Namespace) -> int:
    from minitrain.tools.analysis.doctor import report
    from minitrain.training.metrics_log import read_history, warn_damaged

    history = read_history(Path(arguments.run))
    warn_damaged(history.damaged)
    print(report(history))
    return 0


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("other", metavar="RUN", help="another run directory")


@command(
    _compare_arguments,
    "find where two runs first differ",
    usage="RUN RUN",
    example="minitrain compare runs/quickstart-sft runs/warmer",
    docs="metrics.md#where-two-runs-diverge",
)
def compare(arguments: argparse.Namespace) -> int:
    from minitrain.tools.analysis.compare import compare

    lines, are_same = compare(Path(arguments.run), Path(arguments.other))
    print("\n".join(lines))
    return 0 if are_same else 1
