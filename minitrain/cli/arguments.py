"""Arguments that several commands share."""

import argparse
import math
from collections.abc import Callable
from typing import Any


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print only results, warnings and errors")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result, or the error, as one JSON value")


def add_config(parser: argparse.ArgumentParser) -> None:
    about = "the config, also as --config CONFIG.yml; docs/options.md lists its options"
    parser.add_argument("config", metavar="CONFIG.yml", help=about)
    add_config_options(parser)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command with a config takes besides it."""
    parser.add_argument(
        "--overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override options of the file, for example lr=2e-5 loss.name=dft datasets=[a.jsonl,b.csv]",
    )
    parser.add_argument(
        "--plugin",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE.py",
        help="run a file that registers losses, row formats, rewards or environments",
    )
    add_quiet(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run directory, a model folder, or a name on the Hub")
    group = parser.add_argument_group("model")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default %(default)s")
    group.add_argument("--chat-template", default="auto", metavar="T", help="auto, chatml, none or a .jinja file")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def add_template_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the chat template is given besides messages."""
    group = parser.add_argument_group("chat template")
    group.add_argument("--tools", metavar="FILE.json", help="tools the model may call: a list in OpenAI's format")
    group.add_argument(
        "--chat-template-kwargs",
        nargs="+",
        action="extend",
        type=key_value,
        default=[],
        metavar="KEY=VALUE",
        help="arguments of the chat template, for example enable_thinking=false; default: those of training",
    )


def key_value(text: str) -> tuple[str, Any]:
    """Return the key and the value of KEY=VALUE, a value in YAML."""
    import yaml

    key, equals, value = text.partition("=")
    try:
        if not key or not equals:
            raise ValueError
        return key, yaml.safe_load(value)
    except (ValueError, yaml.YAMLError):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, such as enable_thinking=false, got {text!r}") from None


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens", type=number(int, 1), default=max_new_tokens, metavar="N", help="default %(default)s"
    )
    group.add_argument(
        "--temperature", type=number(float, 0), default=0.0, metavar="T", help="0, the default, is greedy"
    )
    group.add_argument(
        "--top-p", type=number(float, 0, 1), default=1.0, metavar="P", help="sample from the likeliest tokens only"
    )
    group.add_argument(
        "--top-k", type=number(int, 0), default=0, metavar="K", help="sample from the K likeliest tokens; 0: from all"
    )
    group.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="strings that end a response")
    group.add_argument(
        "--seed", type=number(int, 0, 2**62), default=0, metavar="N", help="sampling seed; default %(default)s"
    )


def add_rows_output(parser: argparse.ArgumentParser, key: str) -> None:
    about = f"write the rows with their `{key}`, one per line; FILE.json gets a JSON list"
    parser.add_argument("--output", metavar="FILE.jsonl", help=about)
    add_force(parser)
    parser.add_argument("--batch-size", type=number(int, 1), default=16, metavar="N", help="default %(default)s")


def add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")


def number(kind: type, smallest: float, largest: float = float("inf")) -> Callable[[str], float]:
    """Return an argument type for a finite number within limits."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not smallest <= value <= largest or math.isinf(value):
            limits = f"from {smallest} to {largest}" if largest < float("inf") else f"of {smallest} or more"
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return parse
