"""Commands that run a model. Arguments are checked before torch is imported, which takes seconds."""

import argparse
import sys
from collections import Counter
from pathlib import Path

from minitrain.errors import ConfigError, DataError

from .arguments import (
    add_model,
    add_quiet,
    add_rows_output,
    add_sampling,
    add_template_arguments,
    number,
)
from .failure import importing
from .output import new_rows_output, print_info, write_rows
from .registry import command


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    add_sampling(parser, 256)
    add_model(parser)
    add_template_arguments(parser)
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
    docs="generate.md",
)
def generate(arguments: argparse.Namespace) -> int:
    from minitrain.inference.resolve import find_model

    output = new_rows_output(arguments.output, arguments.force)
    find_model(arguments.model)
    prompts = _read_prompts(arguments)
    generator, sampling = _load_generator(arguments)
    from minitrain.data.counts import UNREAD_ROW
    from minitrain.inference.parse import response_columns

    prompt_ids = []
    for prompt in prompts:
        try:
            prompt_ids.append(generator.encode(prompt.messages, prompt.variables))
        except DataError as error:
            raise error.at(prompt.where) from None
    unread = Counter(UNREAD_ROW + key for prompt in prompts for key in prompt.unread)
    _report_counts(generator.counts + unread, len(prompts), arguments.quiet or not arguments.input)
    if any(prompt.variables.get("tools") for prompt in prompts):
        _warn_of_unread_calls(generator)
    responses = generator.generate_from_ids(
        prompt_ids,
        sampling,
        batch_size=arguments.batch_size,
        progress=not arguments.quiet,
        tools=[prompt.variables.get("tools") for prompt in prompts],
    )
    answers = [response.text for response in responses]
    rows, new_columns = [prompt.row for prompt in prompts], response_columns(responses)
    table = _grade_responses(rows, new_columns) if arguments.input else None
    if output is None:
        print(("\n\n" if any("\n" in answer for answer in answers) else "\n").join(answers))
    else:
        print_info(arguments, f"{len(answers)} responses saved to {output}{write_rows(rows, new_columns, output)}")
    if table:
        print(table, file=sys.stderr if output is None else sys.stdout)
    if n_malformed := sum(response.n_malformed for response in responses):
        _warn_of_malformed(n_malformed)
    return 0


def _read_tools(arguments: argparse.Namespace) -> list[dict] | None:
    from minitrain.inference.prompts import read_tools

    return read_tools(arguments.tools) if arguments.tools else None


def _report_counts(counts: dict[str, int], n_rows: int, quiet: bool) -> None:
    """Print on stderr what became of the fields of rows: those that the prompts lack, then all."""
    from minitrain.data.counts import describe_counts, describe_fields, describe_unread

    for line in describe_counts(counts, n_rows):
        _warn(line)
    for line in (describe_fields(counts), describe_unread(counts)):
        if line and not quiet:
            print(line, file=sys.stderr)


def _warn_of_malformed(n: int) -> None:
    _warn(f"{n} tool call{'s' * (n > 1)} cannot be read and stay{'s' * (n == 1)} in the content")


def _warn_of_unread_calls(generator) -> None:
    if not generator.parser.reads_calls:
        _warn("tool calls stay text: the tokenizer has no response_template, and minitrain does not know their syntax")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _read_prompts(arguments: argparse.Namespace) -> list:
    from itertools import islice

    with importing():
        from minitrain.inference.prompts import make_prompt, read_documents, read_prompts
    template, tools = arguments.prompt_template, _read_tools(arguments)
    if arguments.input:
        if arguments.documents:
            raise ConfigError(
                "--documents: conflicts with --input, whose rows name their own documents. Set only one.", "conflict"
            )
        prompts = list(islice(read_prompts(Path(arguments.input), template, tools), arguments.rows))
        if not prompts:
            raise DataError(f"{arguments.input}: contains no prompts. Add at least one.", "no-data")
        return prompts
    if arguments.rows:
        raise ConfigError("--rows: has no effect without --input. Remove it.", "no-effect")
    rows = [{"prompt": text} for text in arguments.prompt]
    if arguments.documents:
        documents = read_documents(arguments.documents)
        rows = [{"question": text, "documents": documents} for text in arguments.prompt]
    return [make_prompt("--prompt", row, template, tools) for row in rows]


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
    add_template_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="TEXT", help="texts to classify or embed")
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
    "classify or embed texts, or score responses, with a trained model",
    usage="MODEL (--text TEXT ... | --prompt TEXT ... | --input FILE) [options]",
    example='minitrain score runs/classify --text "kim sold the small owl"',
    docs="losses.md#classify-unit-example",
)
def score(arguments: argparse.Namespace) -> int:
    from minitrain.inference.resolve import find_model

    output = new_rows_output(arguments.output, arguments.force)
    find_model(arguments.model)
    with importing():
        from minitrain.inference.score import format_prediction, load_scorer, requests_from_args
    requests = requests_from_args(arguments, _read_tools(arguments))
    scorer = load_scorer(
        arguments.model,
        requests,
        arguments.device,
        arguments.chat_template,
        arguments.trust_remote_code,
        dict(arguments.chat_template_kwargs),
    )
    predictions = scorer.predict(requests, arguments.batch_size, progress=not arguments.quiet)
    n_truncated = scorer.counts.pop("truncated", 0)
    _report_counts(scorer.counts, len(requests), arguments.quiet)
    if n_truncated:
        truncated = f"{n_truncated} of {len(requests)} texts were truncated"
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
    add_template_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")


@command(
    _chat_arguments,
    "chat with a trained model",
    usage="MODEL [options]",
    example="minitrain chat runs/quickstart-sft",
    docs="generate.md#chat",
)
def chat(arguments: argparse.Namespace) -> int:
    from minitrain.inference.resolve import find_model

    find_model(arguments.model)
    generator, sampling = _load_generator(arguments)
    variables = {"tools": _read_tools(arguments)} if arguments.tools else {}
    first = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(first)
    print("Type a message. /help shows the commands; /exit or Ctrl-D ends the chat.")
    if variables:
        print(f"Tools: {', '.join(tool['function']['name'] for tool in variables['tools'])}. {RESULT_HELP}")
        _warn_of_unread_calls(generator)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/help":
            print(CHAT_HELP + (f"\n{TOOL_HELP}" if variables else ""))
            continue
        if text == "/reset":
            messages = list(first)
        elif text:
            try:
                messages = _chat_turn(generator, messages, text, sampling, variables)
            except DataError as error:
                print(f"{error.message.rstrip('.')}. Type another message, or /reset.")


CHAT_HELP = """\
/help            shows the commands
/reset           starts a new conversation
/exit or Ctrl-D  ends the chat
Anything else is a message."""
TOOL_HELP = "/tool RESULT     gives the result of a call"
RESULT_HELP = "/tool RESULT gives the result of a call."


def _chat_turn(generator, messages: list[dict], text: str, sampling, variables: dict) -> list[dict]:
    """Return the conversation after a line of the user and the response to it, which is printed."""
    from minitrain.data.messages import count_open_calls, parse_messages

    turn = {"role": "user", "content": text}
    if variables and text.startswith("/tool "):
        turn = {"role": "tool", "content": text.removeprefix("/tool ")}
        if not count_open_calls(messages):
            raise DataError("no tool call waits for a result", "usage")
    turns = parse_messages([*messages, turn], "chat")  # which numbers the calls
    if turn["role"] == "tool" and (n_open := count_open_calls(turns)):
        print(f"{n_open} more: {RESULT_HELP}")
        return turns
    generator.counts.clear()
    response = generator.stream(turns, sampling, variables)
    if not any(message["role"] == "assistant" for message in messages):
        _report_counts(generator.counts, 1, quiet=True)
    if response.n_malformed:
        _warn_of_malformed(response.n_malformed)
    if n_open := count_open_calls([response.message]):
        print(f"{n_open} tool call{'s' * (n_open > 1)}. {RESULT_HELP}")
    return [*turns, response.message]


def _load_generator(arguments: argparse.Namespace):
    if arguments.temperature == 0 and (arguments.top_p < 1 or arguments.top_k):
        name = "--top-p" if arguments.top_p < 1 else "--top-k"
        raise ConfigError(f"{name}: has no effect with temperature 0. Set --temperature above 0.", "no-effect")
    with importing():
        from minitrain.inference.generate import Sampling, load_generator
    generator = load_generator(
        arguments.model,
        arguments.device,
        arguments.chat_template,
        arguments.trust_remote_code,
        dict(arguments.chat_template_kwargs),
    )
    names = ("max_new_tokens", "temperature", "top_p", "seed", "top_k", "stop")
    return generator, Sampling(*(getattr(arguments, name) for name in names))
