"""Commands that take a config. What can be checked without torch is checked before the import, which takes seconds."""

import argparse
import importlib.util
import sys
import traceback
from pathlib import Path

from minitrain.errors import ConfigError, MinitrainError, UnreachableError
from minitrain.io.redact import redact
from minitrain.tools.terminal import use_color

from .arguments import add_config, add_config_options, add_force, add_json, number
from .failure import fail, importing
from .output import error_json, new_output, print_info, print_json
from .registry import command

UNREACHED = 3  # exit code of `validate`


@command(
    add_config,
    "train a model from a YAML file",
    usage="CONFIG.yml [--overrides KEY=VALUE ...]",
    example="minitrain train example/quickstart-sft.yml --overrides exp_name=warmer lr=1e-2",
    docs="options.md",
)
def train(arguments: argparse.Namespace) -> int:
    with importing():
        config = _load_config(arguments)
        import transformers.modeling_utils  # noqa: F401 (what every model imports, while nothing is collected)

        from minitrain.trainer import Trainer
    trainer = Trainer(config)
    trainer.train()
    trainer.parallel.close()
    return 0 if trainer.signal is None else 128 + trainer.signal


def _validate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="*", metavar="CONFIG.yml", help="one or more configs")
    parser.add_argument("--all", metavar="FOLDER", help="check every .yml file in a folder")
    parser.add_argument("--full", action="store_true", help="print the full report of each config, not one line")
    about = "estimate the peak memory on each of N devices; default: the ranks of torchrun, or 1"
    parser.add_argument("--devices", type=number(int, 1), metavar="N", help=about)
    add_config_options(parser)
    add_json(parser)


@command(
    _validate_arguments,
    "check configs and every row of their data",
    usage="(CONFIG.yml ... | --all FOLDER) [--full] [--devices N] [--json] [--overrides KEY=VALUE ...]",
    example="minitrain validate example/quickstart-sft.yml example/dpo.yml --full",
    docs="data.md#check-the-data",
)
def validate(arguments: argparse.Namespace) -> int:
    paths = arguments.configs + _configs_in(arguments.all)
    if not paths:
        raise ConfigError("CONFIG.yml: is missing. Name a config, or a folder of configs with --all.", "usage")
    with importing():
        from minitrain.distributed.process import world_size
    load_plugins(arguments.plugin)
    code, full = 0, arguments.full or len(paths) == 1
    devices, results = arguments.devices or world_size(), []
    for path in paths:
        try:
            with importing():
                config = _parse_config(path, arguments)
                from minitrain.tools.preflight.validate import validate
            report = validate(config, devices, with_memory=full, marks=_marks())
        except UnreachableError as error:
            results.append({"config": path, "valid": None, "error": error_json(error)})
            if not arguments.json:
                print(f"{path}: not checked: {error}", flush=True)
            code = code or UNREACHED
            continue
        except MinitrainError as error:
            results.append({"config": path, "valid": False, "error": error_json(error)})
            if not arguments.json:
                print_info(arguments, f"{path}: invalid")
            code = fail(str(error), error.exit_code)
            continue
        results.append({"config": path, "valid": True, "report": report})
        if not arguments.quiet and not arguments.json:
            _print_report(path, report, full)
    if arguments.json:
        print_json(results)
    return code


def _print_report(path: str, report: dict[str, str], full: bool) -> None:
    if full:
        print(f"{path}: valid", flush=True)
        for name, text in report.items():
            print(redact(f"  {name:<13}" + text.replace("\n", "\n" + " " * 15)))
        return
    line = f"{report['examples']}; steps: {report['steps']}"
    line += f"; warning: {report['warning']}" if "warning" in report else ""
    print(f"{path}: valid; {redact(line)}", flush=True)


def _configs_in(folder: str | None) -> list[str]:
    if folder is None:
        return []
    configs = sorted(str(path) for pattern in ("*.yml", "*.yaml") for path in Path(folder).glob(pattern))
    if not configs:
        raise ConfigError(f"--all: {folder} contains no .yml file. Name a folder of configs.", "not-found")
    return configs


def _rehearse_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    about = "number of processes on this machine; default: 2 with FSDPTrainer, 4 with fsdp.shard=hybrid, else 1"
    parser.add_argument("--ranks", type=number(int, 1), metavar="N", help=about)


@command(
    _rehearse_arguments,
    "try every part of a run in a minute, with a small random model on the CPU",
    usage="CONFIG.yml [--ranks N] [--overrides KEY=VALUE ...]",
    example="minitrain rehearse example/quickstart-sft.yml",
    docs="clusters.md#rehearse-a-run",
)
def rehearse(arguments: argparse.Namespace) -> int:
    load_plugins(arguments.plugin)
    with importing():
        from minitrain.tools.rehearsal.on_cpu import parse_for_cpu

        config, shard, untried = parse_for_cpu(arguments.config, _overrides(arguments))
        from minitrain.tools.rehearsal.rehearse import rehearse
    for line in rehearse(arguments.config, config, shard, untried, arguments.plugin, arguments.ranks):
        if not arguments.quiet or line.startswith("warning: "):
            print(redact(line), flush=True)
    return 0


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--rows", type=number(int, 1), default=4, metavar="N", help="number of examples; default %(default)s"
    )
    parser.add_argument("--split", choices=("train", "eval"), default="train", help="default %(default)s")
    add_json(parser)


@command(
    _inspect_arguments,
    "show what a config trains on, token by token",
    usage="CONFIG.yml [--rows N] [--split train|eval] [--json] [--overrides KEY=VALUE ...]",
    example="minitrain inspect example/dpo.yml --rows 2",
    docs="data.md#check-the-data",
)
def inspect(arguments: argparse.Namespace) -> int:
    with importing():
        config = _load_config(arguments)
        from minitrain.tools.preflight.preview import describe_examples, inspect
    if arguments.json:
        print_json(describe_examples(config, arguments.rows, arguments.split))
        return 0
    for line in inspect(config, arguments.rows, arguments.split, _marks()):
        print(line)
    return 0


def _marks():
    """Return how to mark text: by colors on a terminal."""
    from minitrain.tools.preflight.preview import BRACKETS, COLORS

    return COLORS if use_color() else BRACKETS


def _cache_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--output", metavar="FILE.safetensors", help="default: a file next to the token cache")
    add_force(parser)


@command(
    _cache_teacher_arguments,
    "cache a teacher's log-probabilities",
    usage="CONFIG.yml [--overrides KEY=VALUE ...] [--output FILE]",
    example="minitrain cache-teacher example/kd.yml --overrides loss.top_k=16 --output runs/teacher.safetensors",
    docs="losses.md#kd-unit-supervised-token",
    aliases=("teach",),
)
def cache_teacher(arguments: argparse.Namespace) -> int:
    output = new_output(arguments.output, arguments.force)
    with importing():
        config = _load_config(arguments)
        from minitrain.inference.teacher_cache import cache_teacher_outputs
    path = cache_teacher_outputs(config, output)
    message = f"teacher outputs saved to {path}; train with loss.teacher_outputs={path}"
    print(path if config.quiet else message)
    return 0


def _load_config(arguments: argparse.Namespace):
    """Return the config of a command line, after running its plugins."""
    load_plugins(arguments.plugin)
    return _parse_config(arguments.config, arguments)


def load_plugins(paths: list[str]) -> None:
    """Run the files of --plugin."""
    for path in paths:
        load_plugin(path)


def _parse_config(path: str, arguments: argparse.Namespace):
    from minitrain.tools.preflight.load import load_config

    return load_config(path, _overrides(arguments))


def _overrides(arguments: argparse.Namespace) -> list[str]:
    return [*arguments.overrides, "quiet=true"] if arguments.quiet else arguments.overrides


def load_plugin(path: str) -> None:
    """Run a Python file whose `register_loss` and `schema` decorators extend what configs can name.

    Only the command line can name one, so that a config never runs code.

    Raises:
        ConfigError: The file does not exist or fails; with the line, where it is known.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise ConfigError(f"--plugin: {path} is not an existing Python file. Check the path.", "not-found")
    name = f"minitrain_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their types here
    try:
        spec.loader.exec_module(module)
    except ConfigError as error:
        raise error.at(f"--plugin: {path}") from None
    except SyntaxError as error:
        raise ConfigError(f"--plugin: {path}:{error.lineno or 1}: {error.msg}", "plugin-failed") from None
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file.absolute())]
        where = f"{path}:{lines[-1]}" if lines else path
        raise ConfigError(f"--plugin: {where}: {type(error).__name__}: {error}", "plugin-failed") from None
