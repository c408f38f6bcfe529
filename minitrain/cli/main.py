"""The command line. Nothing heavy is imported before it is known what to do, so that --help is quick."""

import argparse
import difflib
import errno
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from minitrain.config.schema import all_keys
from minitrain.config.suggest import hint_for_key
from minitrain.distributed.process import exit_process
from minitrain.io.redact import redact
from minitrain.training.signals import Terminated, sigterm_raised

from . import commands

if TYPE_CHECKING:
    from minitrain.errors import MinitrainError

EXIT_CODES = """exit codes:
  0    done
  1    training failed (a non-finite loss that does not go away, a full disk or memory); compare: the runs differ
  2    invalid command, config or data
  3    validate: no problem was found, but a model or data set on the Hub could not be reached
  130  stopped by Ctrl-C, 143 by SIGTERM; training writes a checkpoint first; rerun the same command to resume
docs/errors.md explains the code in brackets at the end of an error.
"""
INSTALL = (
    "`pip install -e .` in the folder of minitrain installs all it needs; after `make demo` that is done in .venv: "
    "`source .venv/bin/activate`."
)
CONFIG_COMMANDS = ("train", "validate", "inspect", "teach", "cache-teacher")
LESS_MEMORY = (
    "Make batches smaller (a higher gradient_accumulation_steps; --batch-size, eval_batch_size), or rows "
    "(max_length), or set activation_checkpointing=true."
)


def run(argv: list[str] | None = None, prog: str = "minitrain") -> NoReturn:
    """Run a command and end the process with its exit code."""
    exit_process(main(argv, prog))


def main(argv: list[str] | None = None, prog: str = "minitrain") -> int:
    """Parses the arguments and runs a command; returns the exit code."""
    try:
        code = _run(argv, prog)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str] | None, prog: str) -> int:
    try:
        arguments = _parse(argv, prog)
    except SystemExit as end:  # after --help, --version or a wrong argument
        return end.code
    from minitrain.errors import MinitrainError

    _quiet_libraries()
    try:
        with sigterm_raised():
            return arguments.command(arguments)
    except MinitrainError as error:
        return commands.fail(str(error), error.exit_code)
    except Terminated:
        return commands.fail(commands.STOPPED[signal.SIGTERM], 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return commands.fail(commands.STOPPED[signal.SIGINT], 128 + signal.SIGINT)
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "minitrain":
            raise
        told = f"the package {package} is not installed for {sys.executable}. {INSTALL} [not-installed]"
        return commands.fail(told, 2)
    except (OSError, MemoryError, RuntimeError) as error:
        refused = _of_the_machine(error)
        if refused is None:
            raise
        return commands.fail(str(refused), refused.exit_code)


def _of_the_machine(error: Exception) -> "MinitrainError | None":
    """Return the error of a file that the system refuses, or of memory that is full; None for other errors."""
    from minitrain.errors import MinitrainError, RunError

    if isinstance(error, OSError):
        if not error.strerror:
            return None
        message = f"{redact(str(error.filename))[:80]}: {error.strerror}" if error.filename else error.strerror
        return RunError(message, "no-space") if error.errno == errno.ENOSPC else MinitrainError(message, "os-error")
    words = ("out of memory", "can't allocate memory")
    if isinstance(error, MemoryError) or any(one in str(error) for one in words):
        return RunError(f"out of memory. {LESS_MEMORY}", "out-of-memory")
    return None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(f"{message} [usage]")


def _parse(argv: list[str] | None, prog: str) -> argparse.Namespace:
    parser = _parser(prog)
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        parser.exit(2)
    arguments, unknown = parser.parse_known_args(_config_first(sys.argv[1:] if argv is None else argv))
    if unknown:
        arguments.parser.error(f"unknown arguments: {' '.join(unknown)}{_hint(unknown[0], arguments)}")
    return arguments


def _config_first(argv: list[str]) -> list[str]:
    """Return the arguments with ``--config FILE`` as ``FILE`` right after a command that takes a config."""
    for i, argument in enumerate(argv if argv[:1] and argv[0] in CONFIG_COMMANDS else []):
        name, is_pair, value = argument.partition("=")
        if name == "--config" and (is_pair or argv[i + 1 : i + 2]):
            config = value if is_pair else argv[i + 1]
            return [*argv[:1], config, *argv[1:i], *argv[i + (1 if is_pair else 2) :]]
    return argv


def _hint(unknown: str, arguments: argparse.Namespace) -> str:
    """What may have been meant by an argument that is not known."""
    options = [f"--{name.replace('_', '-')}" for name in vars(arguments)]
    if near := difflib.get_close_matches(unknown, options, n=1, cutoff=0.8):
        return f"; did you mean {near[0]}?"
    if "overrides" not in arguments:
        return ""
    if unknown.startswith("--") or "=" in unknown:
        key, _, value = unknown.strip("-").partition("=")
        key = key.replace("-", "_")
        meant = key if key in all_keys() else hint_for_key(key, value, []).text
        example = f"--overrides {meant}=..." if meant == key else f"--overrides KEY=VALUE. {key}: {meant}"
        return f"; options of the config follow --overrides: {example}"
    return "; give one config at a time" if "config" in arguments else ""


def _parser(prog: str) -> argparse.ArgumentParser:
    """The parser of all commands. `train.py` is the `train` command under another name."""
    from minitrain import __version__

    about = _about("Train language models after pre-training, and use them.")
    parser = _Parser(prog="minitrain", **about)
    parser.add_argument("--version", action="version", version=f"minitrain {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train = _command(commands, "train", "train a model from a YAML file", "CONFIG.yml [--overrides KEY=VALUE ...]")
    train.prog = prog if prog == "train.py" else train.prog
    _train_arguments(train)
    sources = "(--prompt TEXT ... | --input FILE)"
    _generate_arguments(
        _command(commands, "generate", "generate answers with a trained model", f"MODEL {sources} [options]")
    )
    sources = "(--text TEXT ... | --prompt TEXT ... | --input FILE)"
    _score_arguments(
        _command(
            commands, "score", "classify texts or score answers with a trained model", f"MODEL {sources} [options]"
        )
    )
    _chat_arguments(_command(commands, "chat", "chat with a trained model", "MODEL [options]"))
    usage = "RUN [RUN ...] --output DIR [options]"
    _merge_arguments(_command(commands, "merge", "merge adapters into the model's weights", usage))
    usage = "CONFIG.yml [--overrides KEY=VALUE ...] [--output FILE]"
    _teach_arguments(
        _command(
            commands,
            "cache-teacher",
            "cache a teacher's log-probabilities",
            usage,
            aliases=["teach"],
        )
    )
    usage = "RUN [RUN ...] [--figures NAME ...] [--output FILE.png]"
    _plot_arguments(_command(commands, "plot", "plot the metrics of runs", usage))
    _doctor_arguments(_command(commands, "doctor", "diagnose common problems in a run", "RUN"))
    usage = "RUN RUN"
    _compare_arguments(_command(commands, "compare", "find where two runs first differ", usage))
    usage = "CONFIG.yml [--rows N] [--split train|eval] [--overrides KEY=VALUE ...]"
    _inspect_arguments(_command(commands, "inspect", "show what a config trains on, token by token", usage))
    usage = "(CONFIG.yml ... | --all FOLDER) [--full] [--devices N] [--overrides KEY=VALUE ...]"
    _validate_arguments(_command(commands, "validate", "check configs and every row of their data", usage))
    return parser


def _about(text: str) -> dict:
    return {
        "description": text,
        "epilog": EXIT_CODES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }


def _command(commands, name: str, text: str, usage: str, aliases: Sequence[str] = ()) -> argparse.ArgumentParser:
    about = _about(text[0].upper() + text[1:] + ".")
    parser = commands.add_parser(name, aliases=aliases, help=text, usage=f"%(prog)s {usage}", **about)
    parser.set_defaults(parser=parser)
    return parser


def _quiet_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars, and only warnings, errors and results")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.set_defaults(command=commands.train)


def _teach_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--output", metavar="FILE.safetensors", help="beside the token cache when left out")
    parser.add_argument("--force", action="store_true", help="write over an output that exists")
    parser.set_defaults(command=commands.teach)


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument(
        "--rows", type=_number(int, 1), default=4, metavar="N", help="rows of data; default %(default)s"
    )
    parser.add_argument("--split", choices=("train", "eval"), default="train", help="default %(default)s")
    parser.set_defaults(command=commands.inspect)


def _validate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="*", metavar="CONFIG.yml")
    parser.add_argument("--all", metavar="FOLDER", help="every .yml file in a folder")
    parser.add_argument("--full", action="store_true", help="all figures of each, and not one line")
    parser.add_argument(
        "--devices",
        type=_number(int, 1),
        metavar="N",
        help="tell the peak memory on each of N devices; those of torchrun, or 1, when left out",
    )
    _more_config_arguments(parser)
    parser.set_defaults(command=commands.validate)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    about = "every option is explained in docs/options.md; --config CONFIG.yml is the same"
    parser.add_argument("config", metavar="CONFIG.yml", help=about)
    _more_config_arguments(parser)


def _more_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override options of the file, for example lr=2e-5 loss.name=dft datasets=[a.jsonl,b.csv]",
    )
    parser.add_argument(
        "--plugin", nargs="+", action="extend", default=[], metavar="FILE.py", help="run a file that registers losses"
    )
    _quiet_argument(parser)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run directory, a model's folder, or a hub name")
    group = parser.add_argument_group("the model")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default %(default)s")
    group.add_argument("--chat-template", default="auto", metavar="T", help="auto, chatml, none or a .jinja file")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _sampling_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    number = parser.add_argument_group("the answers").add_argument
    number("--max-new-tokens", type=_number(int, 1), default=max_new_tokens, metavar="N", help="default %(default)s")
    number("--temperature", type=_number(float, 0), default=0.0, metavar="T", help="0, the default, is greedy")
    number("--top-p", type=_number(float, 0, 1), default=1.0, metavar="P", help="sample from the likeliest tokens only")
    number("--seed", type=_number(int, 0, 2**62), default=0, metavar="N", help="of sampling; default %(default)s")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _sampling_arguments(parser, 256)
    _model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    source.add_argument(
        "--input", metavar="FILE", help=".txt: a prompt a line; or .jsonl, .json, .csv, .tsv, .parquet rows"
    )
    parser.add_argument("--rows", type=_number(int, 1), metavar="N", help="answer the first N rows of --input only")
    parser.add_argument(
        "--documents", nargs="+", metavar="FILE", help="texts that --prompt asks about, numbered in this order"
    )
    parser.add_argument(
        "--prompt-template", metavar="T", help="the prompt_template of training, with {prompt} or columns in braces"
    )
    _output_arguments(parser, "response")
    _quiet_argument(parser)
    parser.set_defaults(command=commands.generate)


def _output_arguments(parser: argparse.ArgumentParser, key: str) -> None:
    about = f"write the rows with their `{key}`, one per line; a list into FILE.json"
    parser.add_argument("--output", metavar="FILE.jsonl", help=about)
    parser.add_argument("--force", action="store_true", help="write over an output that exists")
    parser.add_argument("--batch-size", type=_number(int, 1), default=16, metavar="N", help="default %(default)s")


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="TEXT", help="texts to label")
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="prompts whose answers are rated; see --response")
    source.add_argument(
        "--input", metavar="FILE", help="rows of texts, pairs or conversations: .jsonl, .json, .csv, .tsv, .parquet"
    )
    parser.add_argument("--text-pair", nargs="+", metavar="TEXT", help="the other half of each --text")
    parser.add_argument("--response", nargs="+", metavar="TEXT", help="the answer to each --prompt")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="which column of FILE holds what"
    )
    _output_arguments(parser, "prediction")
    _quiet_argument(parser)
    parser.set_defaults(command=commands.score)


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    _sampling_arguments(parser, 512)
    _model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.set_defaults(command=commands.chat)


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, or an adapter in PEFT's format")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the model is written")
    share = _number(float, -1000, 1000)
    parser.add_argument("--weights", nargs="+", type=share, metavar="W", help="of each adapter; 1 when left out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="that of the base when left out")
    parser.add_argument("--force", action="store_true", help="write over a model that exists")
    _quiet_argument(parser)
    parser.set_defaults(command=commands.merge)


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; several are drawn over one another")
    parser.add_argument("--output", metavar="FILE.png", help="default RUN/metrics.png, of several runs metrics.png")
    parser.add_argument("--figures", nargs="+", metavar="NAME", help="only these, in this order, for example loss lr")
    parser.add_argument("--force", action="store_true", help="write over a file that is no plot of these runs")
    _quiet_argument(parser)
    parser.set_defaults(command=commands.plot)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory, of a run that still goes on too")
    parser.set_defaults(command=commands.doctor)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("other", metavar="RUN", help="another one")
    parser.set_defaults(command=commands.compare)


def _number(kind: type, least: float, most: float = float("inf")) -> Callable:
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most or math.isinf(value):
            limits = f"from {least} to {most}" if most < float("inf") else f"of {least} or more"
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return parse


def _quiet_libraries() -> None:
    """The bars and hints of these libraries would drown ours. They read this when they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
