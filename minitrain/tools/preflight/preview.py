"""What the loop will see, as text: `minitrain inspect`."""

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
    """What stands before and behind a prompt, and before and behind learned tokens."""

    prompt: tuple[str, str]
    learned: tuple[str, str]


COLOURS = Ink(("\x1b[2m", "\x1b[0m"), ("\x1b[32m", "\x1b[0m"))  # dim, green
BRACKETS = Ink(("", ""), ("⟦", "⟧"))


class Part(NamedTuple):
    """A batch that the loop will see, and which of its examples are shown."""

    title: str
    rows: Rows  # of examples
    chosen: set[int]


def inspect(config: Config, n_examples: int = 4, split: str = "train", ink: Ink = BRACKETS) -> Iterator[str]:
    """Lines about the first examples in the order of the first epoch, or of the evaluation's files.

    They are read out of the very batches that the loop gets on one device. Raises ConfigError or DataError.
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
    """The rows of a batch that hold chosen examples."""
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
    """Where a document lies in its row, and how many of its tokens are learned."""
    row, start, stop = batch.spans[d].tolist()
    learned = int((batch.labels[row, start:stop] != IGNORE_INDEX).sum())
    told = [f"tokens {start} to {stop - 1}", f"{stop - start} tokens, {learned} learned"]
    if batch.prefixes is not None and batch.prefixes[d, 1]:
        first, end = batch.prefixes[d].tolist()
        told.append(f"behind tokens {first} to {end - 1}, which it shares")
    return told


def _values(batch: Batch, d: int, labels: list[str]) -> list[str]:
    """What else a loss knows of a document. `labels` are the names of classes."""
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
    """A document's own tokens, special ones too; where they begin behind others, they are read in that place."""
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
    """Where each run of tokens that are alike ends, and whether it is learned, from [T] bool."""
    marks = learned.numpy()
    ends = [*(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(marks)]
    return [(end, bool(marks[end - 1])) for end in ends]


def _decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _visible(text: str) -> str:
    """With a mark where a line ends, and codes for what cannot be printed, which might move a terminal's cursor."""
    return "".join("↵\n" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
