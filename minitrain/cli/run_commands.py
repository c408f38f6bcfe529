"""Commands that read the logs of runs, without torch."""

import argparse
import contextlib
from pathlib import Path

from minitrain.errors import ConfigError
from minitrain.tools.terminal import use_color

from .arguments import add_json, add_quiet, number
from .output import new_output, print_info, print_json, write_output
from .registry import command


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; several share the panels")
    parser.add_argument(
        "--output", metavar="FILE.png", help="default: RUN/metrics.png, or metrics.png for several runs"
    )
    about = "plot only these metrics, in this order, for example loss lr"
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help=about)
    parser.add_argument("--figures", nargs="+", dest="metrics", help=argparse.SUPPRESS)  # the name in 0.1.0
    about = "write a page, too, with the plot, metrics, samples and diagnosis: FILE.html next to FILE.png"
    parser.add_argument("--html", action="store_true", help=about)
    about = "as --html, again whenever the logs change, until the runs end; look every SECONDS, by default 10"
    parser.add_argument("--watch", nargs="?", const=10.0, type=number(float, 0.1), metavar="SECONDS", help=about)
    parser.add_argument("--force", action="store_true", help="overwrite a file that is not a plot of these runs")
    add_quiet(parser)


@command(
    _plot_arguments,
    "plot the metrics of runs",
    usage="RUN [RUN ...] [--metrics NAME ...] [--output FILE.png] [--html] [--watch [SECONDS]]",
    example="minitrain plot runs/quickstart-sft runs/warmer --output runs/metrics.png",
    docs="metrics.md#looking-at-a-run",
)
def plot(arguments: argparse.Namespace) -> int:
    from minitrain.training.metrics_log import check_exists, read_history, warn_damaged

    runs = [Path(run) for run in arguments.runs]
    if arguments.watch is None:
        histories = [read_history(run) for run in runs]
        for history in histories:
            warn_damaged(history.damaged)
    else:
        for run in runs:
            check_exists(run)
    folder = runs[0] if len(runs) == 1 else Path()
    output = new_output(arguments.output or str(folder / "metrics.png"), force=True)  # `plot` recognizes its own files
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output: expected a .png file, got {output}. Rename the output.", "wrong-format")
    page = output.with_suffix(".html") if arguments.html or arguments.watch else None
    files = f"{output}" + (f" and {page}" if page else "")
    if arguments.watch is None:
        _draw(arguments, histories, output, page)
        print_info(arguments, f"plot saved to {files}")
        return 0
    from minitrain.tools.analysis.watch import watch

    print_info(arguments, f"the plot is in {files}, drawn again whenever the logs change; Ctrl-C ends")

    def draw(histories: list, finished: bool) -> None:
        _draw(arguments, histories, output, page, None if finished else arguments.watch)

    with contextlib.suppress(KeyboardInterrupt):
        watch(runs, draw, arguments.watch)
    return 0


def _draw(
    arguments: argparse.Namespace, histories: list, output: Path, page: Path | None, refresh: float | None = None
) -> None:
    """Write the picture and, with a path for it, the page."""
    from minitrain.tools.analysis.plot import plot
    from minitrain.tools.analysis.plot_html import write_page

    plot(histories, output, arguments.force, arguments.metrics)
    if page is not None:
        write_page(histories, output, page, arguments.force, refresh)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory; the run may still be in progress")
    add_json(parser)


@command(
    _doctor_arguments,
    "diagnose common problems in a run",
    usage="RUN [--json]",
    example="minitrain doctor runs/quickstart-sft",
    docs="metrics.md#looking-at-a-run",
)
def doctor(arguments: argparse.Namespace) -> int:
    from minitrain.tools.analysis.doctor import report, run_checks
    from minitrain.training.metrics_log import read_history, warn_damaged

    history = read_history(Path(arguments.run))
    warn_damaged(history.damaged)
    if arguments.json:
        findings, passed = run_checks(history)
        problems = [{"code": code, **finding._asdict()} for code, finding in findings.items()]
        print_json({"run": arguments.run, "step": history.last_step, "findings": problems, "passed": passed})
        return 0
    print(report(history))
    return 0


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("other", metavar="RUN", help="another run directory")
    add_json(parser)


@command(
    _compare_arguments,
    "find where two runs first differ",
    usage="RUN RUN [--json]",
    example="minitrain compare runs/quickstart-sft runs/warmer",
    docs="metrics.md#where-two-runs-diverge",
)
def compare(arguments: argparse.Namespace) -> int:
    from minitrain.tools.analysis.compare import compare

    comparison = compare(Path(arguments.run), Path(arguments.other))
    if arguments.json:
        print_json(comparison.as_json())
    else:
        print("\n".join(comparison.lines()))
    return 1 if comparison.differences else 0


def _rollouts_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory; the run may still be in progress")
    parser.add_argument("--round", type=number(int, 1), metavar="N", help="the round; default: the last")
    order = parser.add_mutually_exclusive_group()
    about = "show only the answers of the round with the {} rewards"
    for name, rewards in (("best", "highest"), ("worst", "lowest")):
        order.add_argument(f"--{name}", action="store_const", const=name, dest="order", help=about.format(rewards))
    about = "show all answers to the prompt on this line of its data file, in full"
    parser.add_argument("--prompt", type=number(int, 0), metavar="LINE", help=about)
    about = (
        "number of prompts, or of answers with --best, --worst and --prompt; default: 4, or all answers to the prompt"
    )
    parser.add_argument("-n", type=number(int, 1), metavar="N", help=about)
    about = "write a page with all answers to each prompt instead; -n limits the prompts"
    parser.add_argument("--html", metavar="FILE.html", help=about)
    parser.add_argument("--force", action="store_true", help="overwrite the page")


@command(
    _rollouts_arguments,
    "show the sampled answers of a run",
    usage="RUN [--round N] [--best | --worst] [--prompt LINE] [-n N] [--html FILE.html]",
    example="minitrain rollouts runs/rl-sums --round 10 --worst -n 8",
    docs="online.md#read-a-round",
)
def rollouts(arguments: argparse.Namespace) -> int:
    options = (arguments.round, arguments.order, arguments.prompt, arguments.n)
    if page := new_output(arguments.html, arguments.force, "--html"):
        from minitrain.tools.analysis.rollouts_html import rollouts_page

        write_output(rollouts_page(Path(arguments.run), *options), page, "--html")
        print(f"page saved to {page}")
        return 0
    if arguments.force:
        raise ConfigError("--force: has no effect without --html. Remove it.", "no-effect")
    from minitrain.tools.analysis.rollouts import BRACKETS, COLORS, show_answers, show_rounds

    answers = show_answers(Path(arguments.run), *options, COLORS if use_color() else BRACKETS)
    for line in (*show_rounds(Path(arguments.run)), *answers):
        print(line)
    return 0
