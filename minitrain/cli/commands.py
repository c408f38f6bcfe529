"""What the commands do. What can be refused without torch is refused before it is imported, which takes seconds."""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from minitrain.errors import ConfigError, DataError, MinitrainError, UnreachableError
from minitrain.io.redact import redact

from .output import new_output, new_rows_output, recover_folder, refuse_folder, write_rows

UNREACHED = 3  # exit code of `validate`
RANK_0_TELLS_FIRST = 2.0  # seconds
STOPPED = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}


def fail(message: str, code: int) -> int:
    """Tells an error, rank 0 before the others, and returns the exit code."""
    rank, message = os.environ.get("RANK", "0"), redact(message)
    if rank != "0":
        # Mostly rank 0 has the same to tell, and then the launcher ends this process before it repeats it.
        time.sleep(RANK_0_TELLS_FIRST)
        message = f"rank {rank}: {message}"
    print(f"minitrain: {message}", file=sys.stderr)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # of torchrun, which ends in a table of reasons
        with contextlib.suppress(OSError):
            more = {"py_callstack": message, "timestamp": str(int(time.time()))}
            Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": more}}))
    return code


def _inform(arguments: argparse.Namespace, line: str) -> None:
    """A line that is no result."""
    if not arguments.quiet:
        print(line, flush=True)


def train(arguments: argparse.Namespace) -> int:
    with _importing():
        config = _config(arguments)
        from minitrain.trainer import Trainer
    trainer = Trainer(config)
    trainer.train()
    trainer.parallel.close()
    return 0 if trainer.signal is None else 128 + trainer.signal


def generate(arguments: argparse.Namespace) -> int:
    from minitrain.inference.resolve import find_model

    output = new_rows_output(arguments.output, arguments.force)
    find_model(arguments.model)
    prompts = _prompts(arguments)
    generator, sampling = _load_generator(arguments)
    ids = []
    for prompt in prompts:
        try:
            ids.append(generator.encode(prompt.messages))
        except DataError as error:
            raise error.at(prompt.where) from None
    answers = generator.answer(ids, sampling, batch_size=arguments.batch_size, progress=not arguments.quiet)
    rows, added = [prompt.row for prompt in prompts], [{"response": answer} for answer in answers]
    table = _check_sections(rows, added) if arguments.input else None
    if output is None:
        print(("\n\n" if any("\n" in answer for answer in answers) else "\n").join(answers))
    else:
        _inform(arguments, f"{len(answers)} answers written to {output}{write_rows(rows, added, output)}")
    if table:
        print(table, file=sys.stderr if output is None else sys.stdout)
    return 0


def _prompts(arguments: argparse.Namespace) -> list:
    """What `generate` is asked."""
    from itertools import islice

    with _importing():
        from minitrain.inference.generate import Prompt, messages_of, read_documents, read_prompts
    template = arguments.prompt_template
    if arguments.input:
        if arguments.documents:
            raise ConfigError("--documents goes with --prompt; rows of a file have documents of their own", "conflict")
        prompts = list(islice(read_prompts(Path(arguments.input), template), arguments.rows))
        if not prompts:
            raise DataError(f"{arguments.input}: holds no prompts", "no-data")
        return prompts
    if arguments.rows:
        raise ConfigError("--rows goes with --input", "no-effect")
    rows = [{"prompt": text} for text in arguments.prompt]
    if arguments.documents:
        documents = read_documents(arguments.documents)
        rows = [{"question": text, "documents": documents} for text in arguments.prompt]
    return [Prompt("--prompt", row, messages_of(row, template)) for row in rows]


def _check_sections(rows: list[dict], added: list[dict]) -> str | None:
    """Add `sections` to what is added to rows with documents and a teacher's answer. Return a table of them, if any."""
    from minitrain.inference.raft_metrics import table, verdict

    checked = []
    for row, columns in zip(rows, added):
        found = verdict(row, columns["response"])
        if found is not None:
            columns["sections"] = found
            checked.append(row | {"sections": found})
    return table(checked) if checked else None


def score(arguments: argparse.Namespace) -> int:
    from minitrain.inference.resolve import find_model

    output = new_rows_output(arguments.output, arguments.force)
    find_model(arguments.model)
    with _importing():
        from minitrain.inference.score import line, load_judge, requests_from_args
    asked = requests_from_args(arguments)
    judge = load_judge(arguments.model, asked, arguments.device, arguments.chat_template, arguments.trust_remote_code)
    verdicts = judge.verdicts(judge.scores(asked, arguments.batch_size, progress=not arguments.quiet))
    if judge.n_truncated:
        shortened = f"{judge.n_truncated} of {len(asked)} texts were truncated"
        print(f"warning: {shortened} to {judge.limits.max_length} tokens, which the model can read", file=sys.stderr)
    if output is None:
        print("\n".join(map(line, verdicts)))
    else:
        renamed = write_rows([one.row for one in asked], verdicts, output)
        _inform(arguments, f"{len(verdicts)} predictions written to {output}{renamed}")
    return 0


def chat(arguments: argparse.Namespace) -> int:
    from minitrain.inference.resolve import find_model

    find_model(arguments.model)
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
                print(f"{error.message}; say something else, or /reset")


def merge(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    recover_folder(output)
    refuse_folder(output, arguments.force)
    shares = arguments.weights or [1.0] * len(arguments.runs)
    if len(shares) != len(arguments.runs):
        raise ConfigError(
            f"--weights: {len(shares)} numbers for {len(arguments.runs)} adapters; give one for each", "usage"
        )
    if missing := [run for run in arguments.runs if not Path(run).is_dir()]:
        raise ConfigError(f"{missing[0]}: there is no such folder.", "not-found")
    with _importing():
        from minitrain.inference.merge import merge_adapters
    dtype = merge_adapters(arguments.runs, output, shares, arguments.dtype)
    _inform(arguments, f"merged in float32, saved in {dtype}: {output}")
    return 0


def teach(arguments: argparse.Namespace) -> int:
    output = new_output(arguments.output, arguments.force)
    with _importing():
        config = _config(arguments)
        from minitrain.inference.teacher_cache import teach
    written = teach(config, output)
    told = f"the teacher's outputs are in {written}; train from them with loss.teacher_outputs={written}"
    print(written if config.quiet else told)
    return 0


def plot(arguments: argparse.Namespace) -> int:
    from minitrain.tools.analysis.plot import plot
    from minitrain.training.metrics_log import read_history, warn_damaged

    histories = [read_history(Path(run)) for run in arguments.runs]
    for history in histories:
        warn_damaged(history.damaged)
    folder = Path(arguments.runs[0]) if len(histories) == 1 else Path()
    output = new_output(arguments.output or str(folder / "metrics.png"), force=True)  # `plot` knows its own
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output: {output} would be a PNG; give it a name that ends in .png", "wrong-format")
    plot(histories, output, arguments.force, arguments.figures)
    _inform(arguments, f"the plot is in {output}")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from minitrain.tools.analysis.doctor import report
    from minitrain.training.metrics_log import read_history, warn_damaged

    history = read_history(Path(arguments.run))
    warn_damaged(history.damaged)
    print(report(history))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    from minitrain.tools.analysis.compare import compare

    lines, same = compare(Path(arguments.run), Path(arguments.other))
    print("\n".join(lines))
    return 0 if same else 1


def inspect(arguments: argparse.Namespace) -> int:
    with _importing():
        config = _config(arguments)
        from minitrain.tools.preflight.preview import BRACKETS, COLORS, inspect
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # see no-color.org
    for line in inspect(config, arguments.rows, arguments.split, COLORS if coloured else BRACKETS):
        print(line)
    return 0


def validate(arguments: argparse.Namespace) -> int:
    paths = arguments.configs + _configs_in(arguments.all)
    if not paths:
        raise ConfigError("name a config, or with --all a folder of them", "usage")
    with _importing():
        from minitrain.distributed.process import world_size
        from minitrain.tools.preflight.load import load_config

    for plugin in arguments.plugin:
        load_plugin(plugin)
    code, whole = 0, arguments.full or len(paths) == 1
    devices = arguments.devices or world_size()
    for path in paths:
        try:
            with _importing():
                config = load_config(path, _overrides(arguments))
                from minitrain.tools.preflight.validate import validate
            figures = validate(config, devices, with_memory=whole)
        except UnreachableError as error:
            print(f"{path}: not checked: {error}", flush=True)
            code = code or UNREACHED
            continue
        except MinitrainError as error:
            _inform(arguments, f"{path}: refused")
            code = fail(str(error), error.exit_code)
            continue
        if arguments.quiet:
            continue
        short = f"; {figures['examples']}; steps: {figures['steps']}"
        short += f"; warning: {figures['warning']}" if "warning" in figures else ""
        print(f"{path}: fine{'' if whole else redact(short)}", flush=True)
        for name, told in figures.items() if whole else ():
            print(redact(f"  {name:<13}{told}"))
    return code


def _configs_in(folder: str | None) -> list[str]:
    if folder is None:
        return []
    found = sorted(str(path) for kind in ("*.yml", "*.yaml") for path in Path(folder).glob(kind))
    if not found:
        raise ConfigError(f"--all: there is no .yml file in {folder}", "not-found")
    return found


def _config(arguments: argparse.Namespace):
    """The config of a command line, read when its plugins have run."""
    from minitrain.tools.preflight.load import load_config

    for plugin in arguments.plugin:
        load_plugin(plugin)
    return load_config(arguments.config, _overrides(arguments))


def _overrides(arguments: argparse.Namespace) -> list[str]:
    return [*arguments.overrides, "quiet=true"] if arguments.quiet else arguments.overrides


def _load_generator(arguments: argparse.Namespace):
    if arguments.top_p < 1 and arguments.temperature == 0:
        raise ConfigError("--top-p would be ignored: it needs a --temperature above 0", "no-effect")
    with _importing():
        from minitrain.inference.generate import Sampling, load_generator
    generator = load_generator(arguments.model, arguments.device, arguments.chat_template, arguments.trust_remote_code)
    return generator, Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """What a signal would raise ends the process at once: an exception is lost or garbled where torch is imported."""

    def leave(number, frame):
        os._exit(fail(STOPPED[number], 128 + number))

    raising = [number for number in STOPPED if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, leave) for number in raising}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def load_plugin(path: str) -> None:
    """Runs a Python file, whose `register_loss` and `schema` decorators add to what configs can name.

    Raises ConfigError, with the line where it is known, for a file that is not there or fails.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise ConfigError(f"--plugin: {path} is no Python file that exists.", "not-found")
    name = f"minitrain_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their types
    try:
        spec.loader.exec_module(module)
    except ConfigError as error:
        raise error.at(f"--plugin: {path}") from None
    except SyntaxError as error:
        raise ConfigError(f"--plugin: {path}:{error.lineno or 1}: {error.msg}", "plugin-failed") from None
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file.absolute())]
        place = f"{path}:{lines[-1]}" if lines else path
        raise ConfigError(f"--plugin: {place}: {type(error).__name__}: {error}", "plugin-failed") from None
