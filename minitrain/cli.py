"""The command line. Nothing heavy is imported before it is known what to do, so that --help is quick."""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

RANK_0_TELLS_FIRST = 2.0  # seconds
EXIT_CODES = """exit codes:
  0    done
  1    training failed (a non-finite loss that does not go away, a full disk)
  2    something to mend in the command, the config or the data
  130  stopped by Ctrl-C, 143 by SIGTERM; training writes a checkpoint first, and the same command goes on
"""


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
    from .errors import MinitrainError

    _quiet_libraries()
    try:
        return arguments.command(arguments)
    except MinitrainError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # Mostly rank 0 has the same to tell, and then the launcher ends this process before it repeats it.
        time.sleep(RANK_0_TELLS_FIRST)
        message = f"rank {rank}: {message}"
    print(f"minitrain: {message}", file=sys.stderr)
    return code


def _parse(argv: list[str] | None, prog: str) -> argparse.Namespace:
    arguments, unknown = _parser(prog).parse_known_args(argv)
    if unknown:
        hint = "; options of the config stand behind --overrides" if "=" in unknown[0] else ""
        arguments.parser.error(f"unknown arguments: {' '.join(unknown)}{hint}")
    return arguments


def _parser(prog: str) -> argparse.ArgumentParser:
    """The parser of all commands. `train.py` is the `train` command under another name."""
    from . import __version__

    about = _about("Train language models after pre-training, and use them.")
    parser = argparse.ArgumentParser(prog="minitrain", **about)
    parser.add_argument("--version", action="version", version=f"minitrain {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train = _command(commands, "train", "train a model as a YAML file says", "CONFIG.yml [--overrides KEY=VALUE ...]")
    train.prog = prog if prog == "train.py" else train.prog
    _train_arguments(train)
    sources = "(--prompt TEXT ... | --input FILE)"
    _generate_arguments(
        _command(commands, "generate", "answer prompts with a trained model", f"MODEL {sources} [options]")
    )
    _chat_arguments(_command(commands, "chat", "talk to a trained model", "MODEL [options]"))
    usage = "RUN [RUN ...] --output DIR [options]"
    _merge_arguments(_command(commands, "merge", "make adapters part of the model's weights", usage))
    usage = "CONFIG.yml [--overrides KEY=VALUE ...] [--output FILE]"
    _teach_arguments(_command(commands, "teach", "note what a teacher says of a config's data", usage))
    return parser


def _about(text: str) -> dict:
    return {
        "description": text,
        "epilog": EXIT_CODES,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }


def _command(commands, name: str, text: str, usage: str) -> argparse.ArgumentParser:
    about = _about(text[0].upper() + text[1:] + ".")
    parser = commands.add_parser(name, help=text, usage=f"%(prog)s {usage}", **about)
    parser.set_defaults(parser=parser)
    return parser


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.set_defaults(command=_train)


def _teach_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--output", metavar="FILE.safetensors", help="beside the token cache when left out")
    parser.add_argument("--force", action="store_true", help="write over an output that exists")
    parser.set_defaults(command=_teach)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yml", help="every option is explained in docs/options.md")
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
    parser.set_defaults(command=_train)


def _model_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run folder, a model's folder, or a hub name")
    number = parser.add_argument_group("the answers").add_argument
    number("--max-new-tokens", type=_number(int, 1), default=max_new_tokens, metavar="N", help="default %(default)s")
    number("--temperature", type=_number(float, 0), default=0.0, metavar="T", help="0, the default, is greedy")
    number("--top-p", type=_number(float, 0, 1), default=1.0, metavar="P", help="sample from the likeliest tokens only")
    number("--seed", type=_number(int, 0), default=0, metavar="N", help="of sampling; default %(default)s")
    group = parser.add_argument_group("the model")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="default %(default)s")
    group.add_argument("--chat-template", default="auto", metavar="T", help="auto, chatml, none or a .jinja file")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser, 256)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    source.add_argument("--input", metavar="FILE", help=".txt with a prompt a line, or .jsonl, .json, .csv rows")
    parser.add_argument("--output", metavar="FILE.jsonl", help="write the rows with their `response` there")
    parser.add_argument("--force", action="store_true", help="write over an output that exists")
    parser.add_argument("--batch-size", type=_number(int, 1), default=16, metavar="N", help="default %(default)s")
    parser.set_defaults(command=_generate)


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser, 512)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.set_defaults(command=_chat)


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or an adapter in PEFT's format")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the model is written")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="of each adapter; 1 when left out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="that of the base when left out")
    parser.add_argument("--force", action="store_true", help="write over a folder that exists")
    parser.set_defaults(command=_merge)


def _number(kind: type, least: float, most: float = float("inf")) -> Callable:
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            limits = f"from {least} to {most}" if most < float("inf") else f"of {least} or more"
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return parse


# ------------------------------------------------------------------------------------------------------ commands


def _train(arguments: argparse.Namespace) -> int:
    with _importing():
        from .config import load_config
        from .plugin import load_plugin
        from .trainer import Trainer
    for plugin in arguments.plugin:
        load_plugin(plugin)
    config = load_config(arguments.config, arguments.overrides)
    _hide_loading_bar()
    trainer = Trainer(config)
    trainer.train()
    trainer.parallel.close()
    return 0 if trainer.signal is None else 128 + trainer.signal


def _generate(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from .errors import DataError

    with _importing():
        from .generate import Prompt, read_prompts
    output = _new_file(arguments.output, arguments.force)
    if arguments.input:
        prompts = list(read_prompts(Path(arguments.input)))
    else:
        given = [("--prompt", {"prompt": text}) for text in arguments.prompt]
        prompts = [Prompt(where, row, [{"role": "user", "content": row["prompt"]}]) for where, row in given]
    if not prompts:
        raise DataError(f"{arguments.input}: holds no prompts")
    generator, sampling = _load_generator(arguments)
    ids = []
    for prompt in prompts:
        try:
            ids.append(generator.encode(prompt.messages))
        except DataError as error:
            raise DataError(f"{prompt.where}: {error}") from None
    answers = generator.answer(ids, sampling, batch_size=arguments.batch_size, progress=True)
    _write_answers([prompt.row | {"response": answer} for prompt, answer in zip(prompts, answers)], output)
    return 0


def _write_answers(rows: list[dict], output) -> None:
    import json

    from .errors import ConfigError

    if output is None:
        for row in rows:
            print(row["response"])
        return
    part = output.with_name(f".{output.name}.part")
    try:
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.replace(output)
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    print(f"{len(rows)} answers written to {output}")


def _chat(arguments: argparse.Namespace) -> int:
    from .errors import DataError

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
            asked = [*messages, {"role": "user", "content": text}]
            try:
                messages = [*asked, {"role": "assistant", "content": generator.stream(asked, sampling)}]
            except DataError as error:
                print(f"{error}; say something else, or /reset")


def _merge(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from .errors import ConfigError

    output = Path(arguments.output)
    if output.exists() and not arguments.force:
        raise ConfigError(f"--output: {output} exists; choose another name or add --force")
    shares = arguments.weights or [1.0] * len(arguments.runs)
    if len(shares) != len(arguments.runs):
        raise ConfigError(f"--weights: {len(shares)} numbers for {len(arguments.runs)} adapters; give one for each")
    with _importing():
        from .merge import merge
    _hide_loading_bar()
    dtype = merge(arguments.runs, shares, output, arguments.dtype)
    print(f"merged in float32, saved in {dtype}: {output}")
    return 0


def _teach(arguments: argparse.Namespace) -> int:
    output = _new_file(arguments.output, arguments.force)
    with _importing():
        from .config import load_config
        from .teach import teach
    config = load_config(arguments.config, arguments.overrides)
    _hide_loading_bar()
    written = teach(config, output)
    print(f"the teacher's outputs are in {written}; train from them with loss.teacher_outputs={written}")
    return 0


def _new_file(name: str | None, force: bool):
    """The path of an output, if one is named. Raises ConfigError for a place where none can be made."""
    from pathlib import Path

    from .errors import ConfigError

    output = Path(name) if name else None
    if output and output.is_dir():
        raise ConfigError(f"--output: {output} is a folder; name a file in it")
    if output and output.exists() and not force:
        raise ConfigError(f"--output: {output} exists; choose another name or add --force")
    if output and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no folder {output.absolute().parent}")
    return output


def _load_generator(arguments: argparse.Namespace):
    from .errors import ConfigError

    if arguments.top_p < 1 and arguments.temperature == 0:
        raise ConfigError("--top-p would be ignored: it needs a --temperature above 0")
    with _importing():
        from .generate import Sampling, load_generator
    _hide_loading_bar()
    generator = load_generator(arguments.model, arguments.device, arguments.chat_template, arguments.trust_remote_code)
    return generator, Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Ctrl-C ends the process at once: the exception that it raises is lost or garbled where torch is imported."""

    def leave(number, frame):
        os._exit(_fail("interrupted", 128 + number))

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _quiet_libraries() -> None:
    """transformers' own bars and hints would drown ours. It reads these when it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _hide_loading_bar() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
