"""Commands that run or write a model. Arguments are checked before torch is imported, which takes seconds."""

import argparse
import sys
from pathlib import Path

from minitrain.errors import ConfigError, DataError

from .arguments import add_force, add_model, add_quiet, add_rows_output, add_sampling, number
from .failure import exiting_on_signal
from .output import check_new_folder, new_rows_output, print_info, recover_folder, write_rows
from .registry import command


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling(parser, 256)
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or more prompts")
    source.add_argument(
        "--input",
        metavar="FILE",
        help="a .txt file with one prompt per line, or .jsonl, .json, .csv, .tsv, .parquet rows",
    )
    parser.add_argument("--rows", type=number(int, 1), metavar="N", help="use only the first N rows of --input")
    parser.add_argument("--documents", nargs="+", metavar="FILE", help="documents for --prompt, numbered in this order")
    parser.add_argument(
        "--prompt-template", metavar="T", help="the prompt_template of training, with {prompt} or columns in braces"
    )
    add_rows_output(parser, "response")
    add_quiet(parser)


@command(
    _generate_arguments,
    "generate responses with a trained model",
    usage="MODEL (--prompt TEXT ... | --input FILE) [options]",
    example='minitrain generate runs/quickstart-sft --prompt "57 + 36 =" "reverse tiger"',
    docs="data.md",
)
def generate(arguments: argparse.Namespace) -> int:
    from minitrain.inference.resolve import find_model

    output = new_rows_output(arguments.output, arguments.force)
    find_model(arguments.model)
    prompts = _read_prompts(arguments)
    generator, sampling = _load_generator(arguments)
    prompt_ids = []
    for prompt in prompts:
        try:
            prompt_ids.append(generator.encode(prompt.messages))
        except DataError as error:
            raise error.at(prompt.where) from None
    answers = generator.generate_from_ids(
        prompt_ids, sampling, batch_size=arguments.batch_size, progress=not arguments.quiet
    )
    rows, new_columns = [prompt.row for prompt in prompts], [{"response": answer} for answer in answers]
    table = _grade_responses(rows, new_columns) if arguments.input else None
    if output is None:
        print(("\n\n" if any("\n" in answer for answer in answers) else "\n").join(answers))
    else:
        print_info(arguments, f"{len(answers)} responses saved to {output}{write_rows(rows, new_columns, output)}")
    if table:
        print(table, file=sys.stderr if output is None else sys.stdout)
    return 0


def _read_prompts(arguments: argparse.Namespace) -> list:
    from itertools import islice

    with exiting_on_signal():
        from minitrain.inference.generate import Prompt, messages_of, read_documents, read_prompts
    template = arguments.prompt_template
    if arguments.input:
        if arguments.documents:
            raise ConfigError(
                "--documents: conflicts with --input, whose rows name their own documents. Set only one.", "conflict"
            )
        prompts = list(islice(read_prompts(Path(arguments.input), template), arguments.rows))
        if not prompts:
            raise DataError(f"{arguments.input}: contains no prompts. Add at least one.", "no-data")
        return prompts
    if arguments.rows:
        raise ConfigError("--rows: has no effect without --input. Remove it.", "no-effect")
    rows = [{"prompt": text} for text in arguments.prompt]
    if arguments.documents:
        documents = read_documents(arguments.documents)
        rows = [{"question": text, "documents": documents} for text in arguments.prompt]
    return [Prompt("--prompt", row, messages_of(row, template)) for row in rows]


def _grade_responses(rows: list[dict], new_columns: list[dict]) -> str | None:
    """Grade the responses to rows with documents and a teacher's answer; add the grade as the column `sections`.

    Returns:
        A table of the grades; None without such rows.
    """
    from minitrain.inference.raft_metrics import format_table, grade_response

    graded = []
    for row, columns in zip(rows, new_columns):
        grade = grade_response(row, columns["response"])
        if grade is not None:
            columns["sections"] = grade
            graded.append(row | {"sections": grade})
    return format_table(graded) if graded else None


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="TEXT", help="texts to classify")
    source.add_argument(
        "--prompt", nargs="+", metavar="TEXT", help="prompts whose responses are scored; see --response"
    )
    source.add_argument(
        "--input", metavar="FILE", help="rows of texts, pairs or conversations: .jsonl, .json, .csv, .tsv, .parquet"
    )
    parser.add_argument("--text-pair", nargs="+", metavar="TEXT", help="the second text of each --text")
    parser.add_argument("--response", nargs="+", metavar="TEXT", help="the response to each --prompt")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="the column of FILE for each key"
    )
    add_rows_output(parser, "prediction")
    add_quiet(parser)


@command(
    _score_arguments,
    "classify texts or score responses with a trained model",
    usage="MODEL (--text TEXT ... | --prompt TEXT ... | --input FILE) [options]",
    example='minitrain score runs/classify --text "kim sold the small owl"',
    docs="losses.md#classify-unit-example",
)
def score(arguments: argparse.Namespace) -> int:
    from minitrain.inference.resolve import find_model

    output = new_rows_output(arguments.output, arguments.force)
    find_model(arguments.model)
    with exiting_on_signal():
        from minitrain.inference.score import format_prediction, load_scorer, requests_from_args
    requests = requests_from_args(arguments)
    scorer = load_scorer(
        arguments.model, requests, arguments.device, arguments.chat_template, arguments.trust_remote_code
    )
    predictions = scorer.predictions(scorer.scores(requests, arguments.batch_size, progress=not arguments.quiet))
    if scorer.n_truncated:
        truncated = f"{scorer.n_truncated} of {len(requests)} texts were truncated"
        print(f"warning: {truncated} to {scorer.limits.max_length} tokens, the model's limit", file=sys.stderr)
    if output is None:
        print("\n".join(map(format_prediction, predictions)))
    else:
        renamed = write_rows([request.row for request in requests], predictions, output)
        print_info(arguments, f"{len(predictions)} predictions saved to {output}{renamed}")
    return 0


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling(parser, 512)
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")


@command(
    _chat_arguments,
    "chat with a trained model",
    usage="MODEL [options]",
    example="minitrain chat runs/quickstart-sft",
)
def chat(arguments: argparse.Namespace) -> int:
    from minitrain.inference.resolve import find_model

    find_model(arguments.model)
    generator, sampling = _load_generator(arguments)
    first = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(first)
    print("Type a message. /reset starts a new conversation; /exit or Ctrl-D ends the chat.")
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
            turns = [*messages, {"role": "user", "content": text}]
            try:
                messages = [*turns, {"role": "assistant", "content": generator.stream(turns, sampling)}]
            except DataError as error:
                print(f"{error.message.rstrip('.')}. Type another message, or /reset.")


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, or an adapter in PEFT's format")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder of the merged model")
    weight = number(float, -1000, 1000)
    parser.add_argument("--weights", nargs="+", type=weight, metavar="W", help="weight of each adapter; default 1")
    about = "the dtype of the merged model; default: that of the base model"
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=about)
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
        raise ConfigError(f"{missing[0]}: folder does not exist. Check the path.", "not-found")
    with exiting_on_signal():
        from minitrain.inference.merge import merge_adapters
    dtype = merge_adapters(arguments.runs, output, weights, arguments.dtype)
    print_info(arguments, f"merged in float32; saved in {dtype} to {output}")
    return 0


def _load_generator(arguments: argparse.Namespace):
    if arguments.top_p < 1 and arguments.temperature == 0:
        raise ConfigError("--top-p: has no effect with temperature 0. Set --temperature above 0.", "no-effect")
    with exiting_on_signal():
        from minitrain.inference.generate import Sampling, load_generator
    generator = load_generator(arguments.model, arguments.device, arguments.chat_template, arguments.trust_remote_code)
    return generator, Sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
