"""Show the batches of a training as text: `minitrain inspect`."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from minitrain.batch import IGNORE_INDEX, Batch
from minitrain.config.schema import Config
from minitrain.data.loader import MicrobatchLoader
from minitrain.data.sampler import Rows
from minitrain.errors import ConfigError
from minitrain.io.redact import redact

from .dry_run import DryRun, dry_run

PARTS = {"preference": ("chosen", "rejected"), "feedback": ("what was judged", "an answer to another prompt")}


class Ink(NamedTuple):
    """Marks around spans of text.

    Attributes:
        prompt: Before and after tokens that are not targets.
        learned: Before and after targets.
    """

    prompt: tuple[str, str]
    learned: tuple[str, str]


COLOURS = Ink(("\x1b[2m", "\x1b[0m"), ("\x1b[32m", "\x1b[0m"))  # dim, green
BRACKETS = Ink(("", ""), ("⟦", "⟧"))


class Part(NamedTuple):
    """A batch of the training.

    Attributes:
        title: Its step and number.
        rows: The examples of each batch row.
        chosen: Examples to show.
    """

    title: str
    rows: Rows
    chosen: set[int]


def inspect(config: Config, n_examples: int = 4, split: str = "train", ink: Ink = BRACKETS) -> Iterator[str]:
    """Yield lines about the first examples, from the batches that a training on one device gets.

    Args:
        config: The full config.
        n_examples: Number of examples.
        split: `train`, in the order of the first epoch, or `eval`, in the order of the files.
        ink: Marks around targets and other text.

    Raises:
        ConfigError: An option does not fit the model or the data.
        DataError: A data row cannot be used.
    """
    run = dry_run(config)
    examples = run.data.train if split == "train" else run.data.eval
    if examples is None:
        raise ConfigError("--split: there is nothing to evaluate on; give eval_datasets or validation_split.")
    loader = run.loader(examples)
    for part in _training(loader, n_examples) if split == "train" else _evaluation(loader, n_examples):
        if not part.chosen.isdisjoint(itertools.chain.from_iterable(part.rows)):
            yield from _batch(loader.batch(part.rows), part, loader, run, ink)


def _training(loader: MicrobatchLoader, n_examples: int) -> Iterator[Part]:
    size, order = loader.config.total_batch_size, loader.order(0)
    first = order[:n_examples]
    for step, start in enumerate(range(0, len(first), size), 1):
        layout = loader.layout(order[start : start + size])
        chosen = set(first[start : start + size].tolist())
        for number, rows in enumerate(layout, 1):
            yield Part(f"step {step}, micro-batch {number} of {len(layout)}", rows, chosen)


def _evaluation(loader: MicrobatchLoader, n_examples: int) -> Iterator[Part]:
    for number, rows in enumerate(loader.eval_layout(), 1):
        yield Part(f"evaluation, batch {number}", rows, set(range(n_examples)))


def _batch(batch: Batch, part: Part, loader: MicrobatchLoader, run: DryRun, ink: Ink) -> Iterator[str]:
    """Yield lines about the batch rows with chosen examples."""
    n_rows, n_columns = batch.input_ids.shape
    padding = batch.input_ids.numel() - batch.n_tokens
    share = f"{100 * padding / batch.input_ids.numel():.1f} %"
    yield f"{part.title}: {n_rows} rows of {n_columns} tokens; {batch.n_targets} learned, {padding} padding ({share})"
    parts = range(run.data.train.caches[0].n_documents)
    documents = [(example, which) for row in part.rows for example in row for which in parts]  # [D]
    assert len(documents) == batch.n_docs
    places = batch.spans[:, 0].tolist()
    shown = [d for d, (example, _) in enumerate(documents) if example in part.chosen]
    for row, found in itertools.groupby(shown, key=places.__getitem__):
        found = list(found)
        yield f"row {row + 1}"
        for d in found:
            example, which = documents[d]
            name = f", {PARTS[run.loss.record][which]}" if run.loss.record in PARTS else ""
            told = "; ".join(_numbers(batch, d) + _values(batch, d, loader.examples.caches[0].labels))
            yield f"  {redact(loader.examples.where(example))}{name}: {told}"
            yield "    " + _text(batch, d, run.template.tokenizer, ink).replace("\n", "\n    ")
        if others := places.count(row) - len(found):
            yield f"  {others} other documents"
        if padding := int((batch.doc_ids[row] < 0).sum()):
            yield f"  {padding} padding"


def _numbers(batch: Batch, d: int) -> list[str]:
    """Return the position of a document in its batch row, and the number of its targets, in words."""
    row, start, stop = batch.spans[d].tolist()
    learned = int((batch.labels[row, start:stop] != IGNORE_INDEX).sum())
    told = [f"tokens {start} to {stop - 1}", f"{stop - start} tokens, {learned} learned"]
    if batch.prefixes is not None and batch.prefixes[d, 1]:
        first, end = batch.prefixes[d].tolist()
        told.append(f"behind tokens {first} to {end - 1}, which it shares")
    return told


def _values(batch: Batch, d: int, labels: list[str]) -> list[str]:
    """Return the features of a document that the loss uses, in words; `labels` are the names of classes."""
    told = []
    for name, values in batch.values.items():
        number = float(values[d])
        if math.isnan(number):  # a rollout without a reward
            continue
        if name == "label" and labels:
            told.append(f"label {labels[int(number)]}")
        elif name == "desirable":
            told.append("wanted" if number else "not wanted")
        elif name == "group":
            told.append(f"group {int(number) >> 28:x}")  # a hash of 52 bits
        else:
            told.append(f"{name} {number:.4g}")
    row, start, stop = batch.spans[d].tolist()
    learned = batch.labels[row, start:stop] != IGNORE_INDEX  # [T]
    for name, column in batch.columns.items():
        numbers = column[row, start:stop]  # [T, ...]
        numbers = numbers[learned] if learned.any() else numbers
        least, most = float(numbers.min()), float(numbers.max())
        told.append(f"{name} {least:.4g}" + (f" to {most:.4g}" if most != least else ""))
    return told


def _text(batch: Batch, d: int, tokenizer, ink: Ink) -> str:
    """Return the text of a document with special tokens; a shared prefix is decoded with it, but not shown."""
    row, start, stop = batch.spans[d].tolist()
    before = batch.input_ids[row, slice(*batch.prefixes[d].tolist())].tolist() if batch.prefixes is not None else []
    ids = before + batch.input_ids[row, start:stop].tolist()
    text, read = "", _decoded(tokenizer, before)
    for end, learned in _runs(batch.labels[row, start:stop] != IGNORE_INDEX):
        until = _decoded(tokenizer, ids[: len(before) + end])
        left, right = ink.learned if learned else ink.prompt
        text += left + _visible(until[len(read) :]) + right
        read = until
    return text


def _runs(learned: Tensor) -> list[tuple[int, bool]]:
    """Return (end, is target) of each run of equal values in `learned`, bool, shape [T]."""
    marks = learned.numpy()
    ends = [*(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(marks)]
    return [(end, bool(marks[end - 1])) for end in ends]


def _decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _visible(text: str) -> str:
    """Mark ends of lines, and escape characters that cannot be printed, since they could move a terminal's cursor."""
    return "".join("↵\n" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
