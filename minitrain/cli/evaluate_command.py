"""The command `minitrain evaluate`, and the tables that it prints."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitrain.errors import ConfigError, InvalidConfigError
from minitrain.io.paths import near_file

from .arguments import add_config_options, add_force, add_json, number
from .config_commands import load_plugins
from .failure import importing
from .output import new_rows_output, print_info, print_json, write_rows
from .registry import command

if TYPE_CHECKING:
    from minitrain.config.schema import Config
    from minitrain.tools.evaluation.differences import Difference
    from minitrain.tools.evaluation.evaluate import Result, Task

ALL = 10**9  # examples
GENERATION = ("match", "num_generations", "temperature", "max_new_tokens")


def _arguments(parser: argparse.ArgumentParser) -> None:
    about = (
        "a run directory, the folder of a model or an adapter, or a name on the Hub (not with --compare); then "
        "configs, whose evaluation data, loss and template are used, or data files"
    )
    parser.add_argument("inputs", nargs="*", metavar="MODEL CONFIG|FILE", help=about)
    about = "evaluate another model, too, and compare example by example; A and B can be files of --output"
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help=about)
    about = "another model; kl_to_reference is KL(MODEL || R), and a loss with a reference uses R"
    parser.add_argument("--reference", metavar="R", help=about)
    parser.add_argument("--rows", type=number(int, 1), metavar="N", help="use only the first N examples")
    answers = parser.add_argument_group("answers, compared with the response of the row")
    about = "what must be equal: text, number or a regular expression with one group; default: eval_generate.match"
    answers.add_argument("--match", metavar="M", help=about)
    about = "sample N answers to each prompt for pass@1, pass@2, pass@4 and so on"
    answers.add_argument("--num-generations", type=number(int, 2), metavar="N", help=about)
    answers.add_argument("--temperature", type=number(float, 0.01, 100), metavar="T", help="of samples; default: 1")
    answers.add_argument("--max-new-tokens", type=number(int, 1), metavar="N", help="default: 64, or the config's")
    tasks = parser.add_argument_group("standard tasks, by lm-evaluation-harness (pip install minitrain[lm-eval])")
    tasks.add_argument("--tasks", nargs="+", metavar="TASK", help="names of tasks, for example hellaswag gsm8k")
    tasks.add_argument("--include-path", metavar="DIR", help="a folder with tasks of your own")
    tasks.add_argument("--num-fewshot", type=number(int, 0), metavar="N", help="examples in the prompt")
    tasks.add_argument("--apply-chat-template", action="store_true", help="give tasks the chat template")
    parser.add_argument("--output", metavar="FILE.jsonl", help="write the results of each example, one per line")
    add_force(parser)
    add_config_options(parser)
    add_json(parser)


@command(
    _arguments,
    "measure a model without a training, or compare two",
    usage="(MODEL | --compare A B) [CONFIG|FILE ...] [options]",
    example="minitrain evaluate runs/quickstart-sft example/quickstart-sft.yml --json",
    docs="evaluate.md",
)
def evaluate(arguments: argparse.Namespace) -> int:
    output = new_rows_output(arguments.output, arguments.force)
    models, data = arguments.compare or arguments.inputs[:1], arguments.inputs[0 if arguments.compare else 1 :]
    saved = {name: _read_results(name) for name in arguments.compare or () if Path(name).is_file()}
    _check(arguments, models, data, saved)
    with importing():
        from minitrain.inference.resolve import find_model
    load_plugins(arguments.plugin)
    evaluated = [model for model in models if model not in saved]
    for model in (*evaluated, *([arguments.reference] if arguments.reference else [])):
        find_model(model)
    by_example = bool(output or arguments.compare)
    results = _evaluate(arguments, evaluated, data, by_example) if data else []
    if arguments.tasks:
        results += [result for model in evaluated for result in _run_tasks(arguments, model)]
    examples = {model: [row for one in results if one.model == model for row in one.examples] for model in evaluated}
    examples |= saved
    differences = _differences(examples, models) if arguments.compare else []
    if arguments.json:
        print_json(_as_json(results, differences))
    else:
        print("\n\n".join(filter(None, [_table(results), _difference_table(differences, models)])))
    if output:
        rows = [row for model in evaluated for row in examples[model]]
        write_rows(rows, [{}] * len(rows), output)
        if not arguments.json:
            print_info(arguments, f"results of {len(rows):,} examples saved to {output}")
    return 0


def _check(arguments: argparse.Namespace, models: list[str], data: list[str], saved: dict[str, list[dict]]) -> None:
    """Raise ConfigError for arguments that are missing or have no effect."""
    if not models:
        raise ConfigError("MODEL: is missing. Name a run directory, a model or an adapter.", "usage")
    needed = len(saved) < len(models)
    if missing := [name for name in data if Path(name).suffix and not Path(name).exists()]:
        message = f"{missing[0]}: does not exist (relative to {Path.cwd()}).{near_file(Path(missing[0]))}"
        raise ConfigError(message, "not-found")
    if needed and not data and not arguments.tasks:
        raise ConfigError("CONFIG|FILE: is missing. Name a config, data files, or --tasks.", "usage")
    if not arguments.compare and Path(models[0]).is_file():
        raise ConfigError(f"MODEL: {models[0]} is a file. Name a model before the data.", "wrong-path")
    if data and not needed:
        raise ConfigError(f"{data[0]}: has no effect, because both results are in files. Remove it.", "no-effect")
    for name in ("include_path", "num_fewshot", "apply_chat_template"):
        if getattr(arguments, name) not in (None, False) and not arguments.tasks:
            raise ConfigError(f"--{name.replace('_', '-')}: has no effect without --tasks. Remove it.", "no-effect")
    for name in ("reference", "output", *GENERATION):
        if getattr(arguments, name) is not None and not data:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: has no effect without data. Name a config or data files.", "no-effect")
    for option, package, extra in (("compare", "scipy", "stats"), ("tasks", "lm_eval", "lm-eval")):
        if getattr(arguments, option) and find_spec(package) is None:
            message = f"--{option}: package {package} is not installed. Run pip install minitrain[{extra}]."
            raise ConfigError(message, "not-installed")
    if len(models) == 2 and models[0] == models[1]:
        raise ConfigError(f"--compare: {models[0]} is named twice. Name two models.", "usage")


def _evaluate(arguments: argparse.Namespace, models: list[str], data: list[str], by_example: bool) -> list["Result"]:
    with importing():
        from minitrain.tools.evaluation.evaluate import evaluate_model
    results = []
    for task in _tasks(arguments, models[0], data):
        for model in models:
            results += evaluate_model(model, task, arguments.reference, by_example)
    return results


def _tasks(arguments: argparse.Namespace, model: str, data: list[str]) -> list["Task"]:
    """Return the configs and, together, the data files of a command line, with the options of their answers."""
    from minitrain.inference.generate import model_config
    from minitrain.inference.resolve import find_model
    from minitrain.tools.evaluation.evaluate import Task

    asked = {name: value for name in GENERATION if (value := getattr(arguments, name)) is not None}
    configs = [name for name in data if Path(name).suffix in (".yml", ".yaml")]
    files = [name for name in data if name not in configs]
    tasks = []
    for name in configs:
        config = _load(name, arguments)
        if asked:
            n = config.eval_generate.n_examples or config.n_eval_examples or ALL
            config = _load(name, arguments, eval_generate={"n_examples": n} | asked)
        if rows := arguments.rows:
            n = min(config.eval_generate.n_examples, rows)
            generation = dataclasses.replace(config.eval_generate, n_examples=n)
            config = dataclasses.replace(config, n_eval_examples=rows, eval_generate=generation)
        tasks.append(Task(name, config))
    if files:
        base = model_config(find_model(model))
        given = {"exp_name": "evaluate", "model": {"name_or_path": base.name_or_path}}
        given |= {"datasets": files, "eval_datasets": files}
        answers = {"eval_generate": {"n_examples": ALL} | asked} if asked else {}
        tasks.append(Task("", _load(given | answers, arguments), arguments.rows))
    return tasks


def _load(source: str | dict[str, Any], arguments: argparse.Namespace, **options: Any) -> "Config":
    """Return a config. Raises ConfigError, which says `command line` for what is not in a file."""
    from minitrain.tools.preflight.load import load_config

    try:
        return load_config(source, arguments.overrides, **options, **({"quiet": True} if arguments.quiet else {}))
    except InvalidConfigError as error:
        places = dict.fromkeys(("config", "load_config(...)"), "command line")
        issues = [issue._replace(where=places.get(issue.where, issue.where)) for issue in error.issues]
        raise InvalidConfigError(issues, error.is_complete) from None


def _run_tasks(arguments: argparse.Namespace, model: str) -> list["Result"]:
    with importing():
        from minitrain.inference.generate import load_generator
        from minitrain.tools.evaluation.harness import run_tasks
    names = ("tasks", "include_path", "num_fewshot", "apply_chat_template")
    options = {name: getattr(arguments, name) for name in names}
    return run_tasks(model, load_generator(model), limit=arguments.rows, **options)


def _read_results(name: str) -> list[dict[str, Any]]:
    """Return the results of examples in a file of --output. Raises ConfigError."""
    try:
        rows = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]
        assert rows and all({"data", "line", "weights"} <= row.keys() for row in rows)
    except (OSError, ValueError, AttributeError, AssertionError):
        message = f"--compare: {name} is neither a model nor a file of `minitrain evaluate --output`. Check the path."
        raise ConfigError(message, "wrong-format") from None
    return rows


def _differences(examples: dict[str, list[dict]], models: Sequence[str]) -> list["Difference"]:
    from minitrain.tools.evaluation.differences import paired_differences

    return paired_differences(*(examples[model] for model in models))


# ------------------------------------------------------------------------------------------------------- the result


def _as_json(results: list["Result"], differences: list["Difference"]) -> dict[str, Any]:
    plain = [{key: value for key, value in result._asdict().items() if key != "examples"} for result in results]
    return {"results": plain} | ({"differences": [one._asdict() for one in differences]} if differences else {})


def _table(results: list["Result"]) -> str:
    """Return a table with a column for each model and data set, and a row for each metric."""
    if not results:
        return ""
    several = len({result.model for result in results}) > 1
    models, data = (_short([getattr(result, key) for result in results]) for key in ("model", "data"))
    heads = [[""] * (1 + several)]
    heads += [[models[result.model]] * several + [data[result.data]] for result in results]
    names = dict.fromkeys(name for result in results for name in result.metrics)
    rows = [["examples", *(f"{result.n_examples:,}" for result in results)]]
    rows += [[name, *(_number(result.metrics.get(name)) for result in results)] for name in names]
    return _aligned([list(head) for head in zip(*heads, strict=True)] + rows)


def _difference_table(differences: list["Difference"], models: list[str]) -> str:
    """Return a table with a row for each metric of each data set."""
    if not differences:
        return ""
    rows = [["", "A", "B", "B - A", "95% interval", "higher", "lower", "p"]]
    for data, name in _short([one.data for one in differences]).items():
        mine = [one for one in differences if one.data == data]
        rows.append([f"{name}, {mine[0].n:,} examples", *[""] * 7])
        for one in mine:
            interval = "" if one.low is None else f"{one.low:.4g} to {one.high:.4g}"
            numbers = [_number(number) for number in (one.a, one.b, one.b - one.a)]
            rows.append([f"  {one.metric}", *numbers, interval, str(one.higher), str(one.lower), f"{one.p_value:.2g}"])
    names = "\n".join(f"{name}: {model}" for name, model in zip("AB", models, strict=True))
    return f"{names}\n\n{_aligned(rows)}"


def _aligned(rows: list[list[str]]) -> str:
    """Return rows of cells as text, the first column left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _short(paths: Sequence[str]) -> dict[str, str]:
    """Return the last part of each path, or more of it where several are the same."""
    paths, n = list(dict.fromkeys(paths)), 1
    while len({Path(path).parts[-n:] for path in paths}) < len(paths):
        n += 1
    return {path: "/".join(Path(path).parts[-n:]) for path in paths}
