"""The prompts that `minitrain check` compares: from a file, from the data of the run, or built in."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from minitrain.config.sections import DatasetConfig
from minitrain.data.examples import EXAMPLE_COLUMNS, Example, to_example
from minitrain.data.messages import Messages, user
from minitrain.data.source import is_file, open_source
from minitrain.data.template import Template
from minitrain.errors import ConfigError, DataError, MinitrainError
from minitrain.training.metrics_log import read_settings

from .prompts import Prompt, read_prompts

BUILT_IN = (
    "Hello!",
    "What is the capital of France?",
    "Name three colors.",
    "Write a haiku about the sea.",
    "What is 17 + 25?",
    "Why is the sky blue?",
    "Translate to German: good morning",
    "List the days of the week.",
    "Who wrote Hamlet?",
    "Explain what a prime number is in one sentence.",
    "Write a Python function that reverses a string.",
    "What is the opposite of hot?",
    "How many legs does a spider have?",
    "Summarize in five words: The cat sat on the mat because it was warm.",
    "Continue the story: Once upon a time",
    "Is 91 prime?\nAnswer yes or no.",
    "What comes after Monday?",
    "Give me a recipe with eggs and milk.",
    "Sort these numbers: 3, 1, 2",
    "Say nothing but OK.",
)


def choose_prompts(source: str, file: str | None, n: int, template: Template) -> tuple[list[Prompt], str]:
    """Return up to n prompts, and where they are from.

    Args:
        source: The run directory or folder of a model that is checked.
        file: A file of prompts (default: the rows that the run is evaluated on, then the built-in prompts).
        n: Their number.
        template: Encodes them; those that it refuses are left out.

    Raises:
        ConfigError: No prompt can be encoded.
        DataError: The file cannot be read.
    """
    if file is not None:
        candidates = [(read_prompts(Path(file)), file)]
    else:
        built_in = (Prompt("built-in", {}, [user(text)], {}, []) for text in BUILT_IN)
        candidates = [*_of_run(Path(source)), (built_in, "minitrain")]
    for prompts, where in candidates:
        chosen = list(itertools.islice((prompt for prompt in prompts if _can_encode(template, prompt)), n))
        if chosen:
            return chosen, where
    raise ConfigError(
        f"{file or source}: the chat template cannot encode any prompt. Name prompts by --prompts.", "no-data"
    )


def _can_encode(template: Template, prompt: Prompt) -> bool:
    try:
        template.encode_prompt(prompt.messages, prompt.variables)
    except DataError:
        return False
    return True


def _of_run(folder: Path) -> Iterator[tuple[Iterator[Prompt], str]]:
    """Yield the prompts in the data files of a run, those for evaluation first."""
    settings = read_settings(folder) or read_settings(folder.parent) or {}
    entries = [entry for key in ("eval_datasets", "datasets") for entry in settings.get(key) or []]
    for entry in entries:
        dataset = DatasetConfig(entry) if isinstance(entry, str) else DatasetConfig(**entry)
        if is_file(dataset) and Path(dataset.path).is_file():
            yield _prompts_of(dataset), dataset.path


def _prompts_of(dataset: DatasetConfig) -> Iterator[Prompt]:
    seen = []
    for line, row in open_source(dataset).rows():
        messages, example = None, _example_of(row, dataset) if isinstance(row, dict) else None
        if example is not None:
            messages = _prompt_of(example)
        if messages and messages not in seen:
            seen.append(messages)
            yield Prompt(f"{dataset.path}:{line}", row, messages, example.variables, [])


def _example_of(row: dict, dataset: DatasetConfig) -> Example | None:
    """Return the example in a row, of the first kind that it has the keys of."""
    for kind in EXAMPLE_COLUMNS:
        try:
            return to_example(row, dataset, kind)
        except (MinitrainError, KeyError):  # KeyError: dataset.type is a format of another kind
            continue
    return None


def _prompt_of(example: Example) -> Messages | None:
    """Return the messages of an example before its last response."""
    messages = getattr(example, "messages", None) or getattr(example, "prompt", None)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None  # a text, or the ids of a rollout
    if messages[-1]["role"] != "assistant":
        return messages
    return messages[:-1] or None
