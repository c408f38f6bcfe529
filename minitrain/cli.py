"""The command line. Nothing heavy is imported before it is known what to do, so that --help is quick."""

import argparse
import os
import sys
from collections.abc import Callable

EXIT_CODES = """exit codes:
  0    done
  1    training failed (a non-finite loss that does not go away, a full disk)
  2    something to mend in the command, the config or the data
  130  stopped by Ctrl-C, 143 by SIGTERM: a checkpoint was written, the same command goes on
"""


def main(argv: list[str] | None = None, prog: str = "minitrain") -> int:
    """Parses the arguments and runs a command; returns the exit code."""
    arguments = _parser(prog).parse_args(argv)
    from .errors import MinitrainError, RunError

    try:
        return arguments.command(arguments)
    except RunError as error:
        return _fail(str(error), 1)
    except MinitrainError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _fail(message: str, code: int) -> int:
    print(f"minitrain: {message}", file=sys.stderr)
    return code


def _parser(prog: str) -> argparse.ArgumentParser:
    from . import __version__

    if prog == "train.py":
        parser = argparse.ArgumentParser(prog=prog, **_about("Train a language model as a YAML file says."))
        parser.add_argument("train", help=argparse.SUPPRESS)
        _train_arguments(parser)
        return parser
    parser = argparse.ArgumentParser(prog=prog, **_about("Train language models after pre-training, and use them."))
    parser.add_argument("--version", action="version", version=f"minitrain {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _train_arguments(_command(commands, "train", "train a model as a YAML file says"))
    _generate_arguments(_command(commands, "generate", "answer prompts with a trained model"))
    _chat_arguments(_command(commands, "chat", "talk to a trained model"))
    return parser


def _about(text: str) -> dict:
    return {
        "description": text,
        "epilog": EXIT_CODES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }


def _command(commands, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, **_about(text[0].upper() + text[1:] + "."))


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file; every option is explained in docs/options.md")
    parser.add_argument(
        "--overrides",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="options that override the file, e.g. lr=2e-5 loss.name=dft datasets=[a.jsonl,b.csv]",
    )
    parser.set_defaults(command=_train)


def _model_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument("model", help="a run folder, a model's folder, or a hub name")
    parser.add_argument(
        "--max-new-tokens", type=_at_least(int, 1), default=max_new_tokens, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--temperature", type=_at_least(float, 0), default=0.0, metavar="T", help="0, the default, is greedy"
    )
    parser.add_argument("--top-p", type=_at_least(float, 0), default=1.0, metavar="P", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of sampling; default %(default)s")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default %(default)s")
    parser.add_argument("--chat-template", default="auto", metavar="T", help="auto, chatml, none or a .jinja file")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser, 256)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    source.add_argument("--input", metavar="FILE", help=".txt with a prompt a line, or .jsonl, .json, .csv rows")
    parser.add_argument("--output", metavar="FILE.jsonl", help="write the rows with their `response` there")
    parser.add_argument("--force", action="store_true", help="write over an output that exists")
    parser.add_argument("--batch-size", type=_at_least(int, 1), default=16, metavar="N", help="default %(default)s")
    parser.set_defaults(command=_generate)


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser, 512)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.set_defaults(command=_chat)


def _at_least(kind: type, least: float) -> Callable:
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:
            raise argparse.ArgumentTypeError(f"expected a number of {least} or more, got {text!r}")
        return value

    return parse


# ------------------------------------------------------------------------------------------------------ commands


def _train(arguments: argparse.Namespace) -> int:
    from .config import load_config

    config = load_config(arguments.config, arguments.overrides)
    _quiet_libraries()
    from .trainer import Trainer

    trainer = Trainer(config)
    trainer.train()
    return 0 if trainer.signal is None else 128 + trainer.signal


def _generate(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from .errors import ConfigError
    from .generate import read_prompts

    output = Path(arguments.output) if arguments.output else None
    if output and output.exists() and not arguments.force:
        raise ConfigError(f"{output} exists; choose another name or add --force")
    if output and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no folder {output.absolute().parent}")
    if arguments.input:
        rows = list(read_prompts(Path(arguments.input)))
    else:
        rows = [({"prompt": text}, [{"role": "user", "content": text}]) for text in arguments.prompt]
    generator, sampling = _load_generator(arguments)
    conversations = [messages for _, messages in rows]
    answers = generator.answer_messages(conversations, sampling, batch_size=arguments.batch_size, progress=True)
    _write_answers([row | {"response": answer} for (row, _), answer in zip(rows, answers, strict=True)], output)
    return 0


def _write_answers(rows: list[dict], output) -> None:
    import json

    if output is None:
        for row in rows:
            print(row["response"])
        return
    part = output.with_name(output.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(output)
    print(f"{len(rows)} answers written to {output}")


def _chat(arguments: argparse.Namespace) -> int:
    generator, sampling = _load_generator(arguments)
    first = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(first)
    print("Type a message; /reset forgets the conversation, /exit or Ctrl-D ends it.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/reset":
            messages = list(first)
        elif text:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": generator.stream(messages, sampling)})


def _load_generator(arguments: argparse.Namespace):
    _quiet_libraries()
    import torch

    from .generate import Sampling, load_generator

    torch.manual_seed(arguments.seed)
    generator = load_generator(arguments.model, arguments.device, arguments.chat_template, arguments.trust_remote_code)
    return generator, Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p)


def _quiet_libraries() -> None:
    """transformers' own bars and hints would drown ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
