"""Show the batches of a training as text: `minitrain inspect`."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from minitrain.batch import IGNORE_INDEX, Batch
from minitrain.config.schema import Config
from minitrain.data.loader import BatchRows, MicrobatchLoader
from minitrain.errors import ConfigError
from minitrain.io.redact import redact
from minitrain.training.setup import Preparation, dry_run

DOCUMENT_NAMES = {
    "preference": ("chosen", "rejected"),
    "unpaired_preference": ("rated response", "response to another prompt"),
}


class Marks(NamedTuple):
    """Marks around spans of text.

    Attributes:
        prompt: Before and after tokens that are not targets.
        target: Before and after targets.
    """

    prompt: tuple[str, str]
    target: tuple[str, str]


COLORS = Marks(("\x1b[2m", "\x1b[0m"), ("\x1b[32m", "\x1b[0m"))  # dim, green
BRACKETS = Marks(("", ""), ("⟦", "⟧"))


class BatchPreview(NamedTuple):
    """A batch of the training.

    Attributes:
        title: Its step and number.
        rows: The examples of each batch row.
        selected: Examples to show.
    """

    title: str
    rows: BatchRows
    selected: set[int]


def inspect(config: Config, n_examples: int = 4, split: str = "train", marks: Marks = BRACKETS) -> Iterator[str]:
    """Yield lines about the first examples, from the batches of a training on one device.

    Args:
        config: The full config.
        n_examples: Number of examples.
        split: `train`, in the order of the first epoch, or `eval`, in the order of the files.
        marks: Marks around targets and other text.

    Raises:
        ConfigError: An option does not fit the model or the data.
        DataError: A data row cannot be used.
    """
    run = dry_run(config)
    loader = run.train_loader if split == "train" else run.eval_loader
    if loader is None:
        raise ConfigError(
            "--split: the config has no evaluation data. Set eval_datasets or validation_split.", "no-data"
        )
    for preview in _training(loader, n_examples) if split == "train" else _evaluation(loader, n_examples):
        if not preview.selected.isdisjoint(itertools.chain.from_iterable(preview.rows)):
            yield from _batch(loader.batch(preview.rows), preview, loader, run, marks)


def _training(loader: MicrobatchLoader, n_examples: int) -> Iterator[BatchPreview]:
    size, order = loader.config.total_batch_size, loader.order(0)
    first = order[:n_examples]
    for step, start in enumerate(range(0, len(first), size), 1):
        layout = loader.layout(order[start : start + size])
        selected = set(first[start : start + size].tolist())
        for number, rows in enumerate(layout, 1):
            yield BatchPreview(f"step {step}, micro-batch {number} of {len(layout)}", rows, selected)


def _evaluation(loader: MicrobatchLoader, n_examples: int) -> Iterator[BatchPreview]:
    for number, rows in enumerate(loader.eval_layout(), 1):
        yield BatchPreview(f"evaluation, batch {number}", rows, set(range(n_examples)))


def _batch(
    batch: Batch, preview: BatchPreview, loader: MicrobatchLoader, run: Preparation, marks: Marks
) -> Iterator[str]:
    """Yield lines about the batch rows with chosen examples."""
    n_rows, n_columns = batch.input_ids.shape
    padding = batch.input_ids.numel() - batch.n_tokens
    percent = f"{100 * padding / batch.input_ids.numel():.1f} %"
    counts = f"{batch.n_targets} targets, {padding} padding ({percent})"
    yield f"{preview.title}: {n_rows} rows of {n_columns} tokens; {counts}"
    documents = [
        (example, number) for row in preview.rows for example in row for number in range(len(loader.examples[example]))
    ]  # [D]
    assert len(documents) == batch.n_docs
    row_of_document = batch.spans[:, 0].tolist()
    selected_documents = [d for d, (example, _) in enumerate(documents) if example in preview.selected]
    for row, documents_of_row in itertools.groupby(selected_documents, key=row_of_document.__getitem__):
        documents_of_row = list(documents_of_row)
        yield f"row {row + 1}"
        for d in documents_of_row:
            example, number = documents[d]
            name = _document_name(run.loss.example_type, number, len(loader.examples[example]))
            phrases = "; ".join(_numbers(batch, d) + _values(batch, d, loader.examples.caches[0].labels))
            yield f"  {redact(loader.examples.where(example))}{name}: {phrases}"
            yield "    " + _text(batch, d, run.template.tokenizer, marks).replace("\n", "\n    ")
        if n_others := row_of_document.count(row) - len(documents_of_row):
            yield f"  {n_others} other documents"
        if padding := int((batch.doc_ids[row] < 0).sum()):
            yield f"  {padding} padding"


def _document_name(example_type: str, number: int, n_documents: int) -> str:
    """Return the name of a document if its example has several."""
    if example_type in DOCUMENT_NAMES:
        return f", {DOCUMENT_NAMES[example_type][number]}"
    return f", document {number + 1} of {n_documents}" if n_documents > 1 else ""


def _numbers(batch: Batch, d: int) -> list[str]:
    """Return the position of a document in its batch row, and the number of its targets, in words."""
    row, start, stop = batch.spans[d].tolist()
    n_targets = int((batch.labels[row, start:stop] != IGNORE_INDEX).sum())
    phrases = [f"tokens {start} to {stop - 1}", f"{stop - start} tokens, {n_targets} targets"]
    if batch.prefixes is not None and batch.prefixes[d, 1]:
        first, end = batch.prefixes[d].tolist()
        phrases.append(f"after the shared tokens {first} to {end - 1}")
    return phrases


def _values(batch: Batch, d: int, labels: list[str]) -> list[str]:
    """Return the features of a document that the loss uses, in words; `labels` are the names of classes."""
    phrases = []
    for name, values in batch.doc_features.items():
        number = float(values[d])
        if math.isnan(number):  # a rollout without a reward
            continue
        if name == "label" and labels:
            phrases.append(f"label {labels[int(number)]}")
        elif name == "desirable":
            phrases.append("desirable" if number else "undesirable")
        elif name == "group":
            phrases.append(f"group {int(number) >> 28:x}")  # a hash of 52 bits
        else:
            phrases.append(f"{name} {number:.4g}")
    row, start, stop = batch.spans[d].tolist()
    is_target = batch.labels[row, start:stop] != IGNORE_INDEX  # [T]
    for name, column in batch.token_features.items():
        numbers = column[row, start:stop]  # [T, ...]
        numbers = numbers[is_target] if is_target.any() else numbers
        smallest, largest = float(numbers.min()), float(numbers.max())
        phrases.append(f"{name} {smallest:.4g}" + (f" to {largest:.4g}" if largest != smallest else ""))
    return phrases


def _text(batch: Batch, d: int, tokenizer, marks: Marks) -> str:
    """Return the text of a document with special tokens; a shared prefix is decoded with it, but not shown."""
    row, start, stop = batch.spans[d].tolist()
    before = batch.input_ids[row, slice(*batch.prefixes[d].tolist())].tolist() if batch.prefixes is not None else []
    ids = before + batch.input_ids[row, start:stop].tolist()
    text, read = "", _decode(tokenizer, before)
    for end, is_target in _runs(batch.labels[row, start:stop] != IGNORE_INDEX):
        until = _decode(tokenizer, ids[: len(before) + end])
        left, right = marks.target if is_target else marks.prompt
        text += left + _escape(until[len(read) :]) + right
        read = until
    return text


def _runs(is_target: Tensor) -> list[tuple[int, bool]]:
    """Return (end, is target) of each run of equal values in `is_target`, bool, shape [T]."""
    marks = is_target.numpy()
    ends = [*(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(marks)]
    return [(end, bool(marks[end - 1])) for end in ends]


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _escape(text: str) -> str:
    """Mark ends of lines, and escape characters that cannot be printed, since they could move a terminal's cursor."""
    return "".join("↵\n" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
