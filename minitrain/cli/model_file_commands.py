"""Commands that write or check the files of a model. Arguments are checked before torch is imported."""

import argparse
import dataclasses
from pathlib import Path

from minitrain.errors import ConfigError
from minitrain.inference.push import prepare_push, push_folder

from .arguments import add_force, add_json, add_quiet, number
from .failure import importing
from .output import check_new_folder, print_info, print_json, recover_folder
from .registry import command


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, or an adapter in PEFT's format")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder of the merged model")
    weight = number(float, -1000, 1000)
    parser.add_argument("--weights", nargs="+", type=weight, metavar="W", help="weight of each adapter; default 1")
    about = "the dtype of the merged model; default: that of the base model"
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=about)
    about = "upload the merged model to this repository on the Hub, which is private if it is new"
    parser.add_argument("--push", metavar="OWNER/NAME", help=about)
    add_force(parser)
    add_quiet(parser)


@command(
    _merge_arguments,
    "merge adapters into the model's weights",
    usage="RUN [RUN ...] --output DIR [options]",
    example="minitrain merge runs/lora-sft --output runs/merged",
    docs="adapters.md#merging",
)
def merge(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    recover_folder(output)
    check_new_folder(output, arguments.force)
    weights = arguments.weights or [1.0] * len(arguments.runs)
    if len(weights) != len(arguments.runs):
        raise ConfigError(
            f"--weights: expected one number per adapter ({len(arguments.runs)}), got {len(weights)}. Set all of them.",
            "usage",
        )
    if missing := [run for run in arguments.runs if not Path(run).is_dir()]:
        raise ConfigError(
            f"{missing[0]}: folder does not exist (relative to {Path.cwd()}). Check the path.", "not-found"
        )
    if arguments.push:
        prepare_push(arguments.push)
    with importing():
        from minitrain.inference.merge import merge_adapters
    dtype = merge_adapters(arguments.runs, output, weights, arguments.dtype)
    print_info(arguments, f"merged in float32; saved in {dtype} to {output}")
    if arguments.push:
        print_info(arguments, f"uploaded to {push_folder(arguments.push, output)}")
    return 0


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a run directory, or the folder of a model or an adapter")
    about = "the base model; default: that of the adapter. For a model, its tensors must have the names of B's"
    parser.add_argument("--base", metavar="B", help=about)
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group = parser.add_argument_group("responses")
    about = (
        "prompts, one per line of a .txt file, or rows; default: rows that the run is evaluated on, or built-in prompts"
    )
    group.add_argument("--prompts", metavar="FILE", help=about)
    group.add_argument("--n-prompts", type=number(int, 1), default=20, metavar="N", help="default %(default)s")
    group.add_argument("--max-new-tokens", type=number(int, 1), default=32, metavar="N", help="default %(default)s")
    group = parser.add_argument_group("server")
    group.add_argument("--url", metavar="URL", help="compare with an OpenAI-compatible server: http://localhost:8000")
    group.add_argument("--model", dest="served_model", metavar="NAME", help="its model; default: the only one")
    about = "dtype that the server computes in; default: that of the saved weights"
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=about)
    group.add_argument(
        "--timeout",
        type=number(float, 0.1),
        default=60.0,
        metavar="S",
        help="seconds for a request; default %(default)g",
    )
    add_json(parser)


@command(
    _check_arguments,
    "check that transformers, PEFT or a server say the same as minitrain with a saved model",
    usage="DIR [--base B] [--prompts FILE] [--url URL] [options]",
    example="minitrain check runs/quickstart-sft --url http://localhost:8000",
    docs="serving.md",
)
def check(arguments: argparse.Namespace) -> int:
    from minitrain.inference.resolve import find_model

    find_model(arguments.model)
    with importing():
        from minitrain.inference.check import check_model
        from minitrain.inference.served import Server
    server = None
    if arguments.url is not None:
        server = Server(arguments.url, arguments.served_model, arguments.timeout)
    elif option := next((name for name in ("served_model", "dtype") if vars(arguments)[name]), None):
        name = option.removeprefix("served_")
        raise ConfigError(f"--{name}: has no effect without --url. Remove it.", "no-effect")
    names = ("base", "trust_remote_code", "prompts", "n_prompts", "max_new_tokens", "dtype")
    report = check_model(arguments.model, server=server, **{name: vars(arguments)[name] for name in names})
    if arguments.json:
        print_json(dataclasses.asdict(report))
    else:
        _print_check(report, with_commands=server is None)
    return 0 if report.passed else 1


def _print_check(report, with_commands: bool) -> None:
    width = max(map(len, report.lines))
    print("\n".join(f"{topic:<{width}}  {line}" for topic, line in report.lines.items()))
    if report.difference is not None:
        print(f"\nfirst difference: {report.difference}\nlikely cause: {report.cause}")
    for name, lines in report.commands.items() if with_commands else ():
        print("\n".join([f"\nServe it with {name}:", *lines]))
