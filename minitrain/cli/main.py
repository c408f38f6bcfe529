"""Parse the command line and run a command. Nothing heavy is imported first, so that --help is quick."""

import argparse
import difflib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from minitrain.config.schema import all_keys
from minitrain.config.suggest import hint_for_key
from minitrain.distributed.process import exit_process
from minitrain.training.signals import Terminated, sigterm_raised

from . import config_commands, evaluate_command, model_commands, model_file_commands, run_commands  # noqa: F401
from .failure import STOPPED, fail, system_error
from .output import error_json, print_json
from .registry import COMMANDS, Command, find_command

if TYPE_CHECKING:
    from minitrain.errors import MinitrainError

EXIT_CODES = """exit codes:
  0    done
  1    training failed (repeated non-finite losses, a full disk or memory); compare: the runs differ;
       check: the model differs
  2    invalid command, config or data
  3    validate: no problem was found, but a model or data set on the Hub could not be reached
  130  stopped by Ctrl-C, 138 by SIGUSR1, 142 by max_minutes, 143 by SIGTERM; training writes a checkpoint first;
       rerun the same command to resume
docs/errors.md explains the code in brackets at the end of an error.
"""


def run(argv: list[str] | None = None, prog: str = "minitrain") -> NoReturn:
    """Run a command and end the process with its exit code."""
    exit_process(main(argv, prog))


def main(argv: list[str] | None = None, prog: str = "minitrain") -> int:
    """Run a command and return its exit code."""
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
    _set_allocator()
    try:
        with sigterm_raised():
            return arguments.command(arguments)
    except MinitrainError as error:
        return _fail(error, arguments)
    except Terminated:
        return fail(STOPPED[signal.SIGTERM], 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return fail(STOPPED[signal.SIGINT], 128 + signal.SIGINT)
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "minitrain":
            raise
        install = "Run `pip install -e .` in the minitrain folder, or `source .venv/bin/activate` after `make demo`."
        return fail(f"package {package} is not installed for {sys.executable}. {install} [not-installed]", 2)
    except (OSError, MemoryError, RuntimeError) as error:
        known = system_error(error)
        if known is None:
            raise
        return _fail(known, arguments)


def _fail(error: "MinitrainError", arguments: argparse.Namespace) -> int:
    """Print an error, with --json also as JSON, and return the exit code."""
    if vars(arguments).get("json"):
        print_json({"error": error_json(error)})
    return fail(str(error), error.exit_code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(f"{message} [usage]")


def _parse(argv: list[str] | None, prog: str) -> argparse.Namespace:
    parser = _parser(prog)
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(2)
    arguments, unknown = parser.parse_known_args(_config_first(argv))
    if unknown:
        arguments.parser.error(f"unknown arguments: {' '.join(unknown)}.{_hint(unknown[0], arguments)}")
    return arguments


def _config_first(argv: list[str]) -> list[str]:
    """Replace ``--config FILE`` by ``FILE`` right after the name of a command that takes a config."""
    command = find_command(argv[0]) if argv else None
    for i, argument in enumerate(argv if command and command.takes_config else []):
        name, is_pair, value = argument.partition("=")
        if name == "--config" and (is_pair or argv[i + 1 : i + 2]):
            config = value if is_pair else argv[i + 1]
            return [*argv[:1], config, *argv[1:i], *argv[i + (1 if is_pair else 2) :]]
    return argv


def _hint(unknown: str, arguments: argparse.Namespace) -> str:
    """Return a sentence about what an unknown argument may mean."""
    options = [f"--{name.replace('_', '-')}" for name in vars(arguments)]
    if near := difflib.get_close_matches(unknown, options, n=1, cutoff=0.8):
        return f" Did you mean {near[0]}?"
    if "overrides" not in arguments:
        return ""
    if unknown.startswith("--") or "=" in unknown:
        key, _, value = unknown.strip("-").partition("=")
        key = key.replace("-", "_")
        meant = key if key in all_keys() else hint_for_key(key, value, []).text
        example = f"--overrides {meant}=..." if meant == key else f"--overrides KEY=VALUE. {key}: {meant}"
        return f" Set options of the config with {example}"
    return " Give one config at a time." if "config" in arguments else ""


def _parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of all commands. `train.py` is the `train` command under another name."""
    from minitrain import __version__

    parser = _Parser(prog="minitrain", **_help_page("Post-train language models, and use them."))
    parser.add_argument("--version", action="version", version=f"minitrain {__version__}")
    parsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        subparser = _add_command(parsers, command)
        if command.name == "train" and prog == "train.py":
            subparser.prog = prog
    return parser


def _add_command(parsers, command: Command) -> argparse.ArgumentParser:
    description = command.summary[0].upper() + command.summary[1:] + "."
    parser = parsers.add_parser(
        command.name,
        aliases=command.aliases,
        help=command.summary,
        usage=f"%(prog)s {command.usage}",
        **_help_page(description),
    )
    command.add_arguments(parser)
    parser.set_defaults(parser=parser, command=command.run)
    return parser


def _help_page(description: str) -> dict:
    return {
        "description": description,
        "epilog": EXIT_CODES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }


def _set_allocator() -> None:
    """Let the memory of a GPU grow in place, which avoids fragments when lengths vary, unless the user has set this."""
    names = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
    if not names & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _quiet_libraries() -> None:
    """Hide progress bars and hints of other libraries, which read these variables when they are imported."""
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which warns of its own kernels
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
