"""Show the batches of a training as text: `minitrain inspect`."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minitrain.batch import IGNORE_INDEX, TARGET_WEIGHTS, Batch
from minitrain.config.schema import Config
from minitrain.data.loader import BatchRows, MicrobatchLoader
from minitrain.errors import ConfigError
from minitrain.io.redact import redact
from minitrain.training.setup import Preparation, dry_run

from ..terminal import escape
from .field_spans import ANSWER, CALL, REASONING, RESULT, RowFields, Span, find_document, read_fields

DOCUMENT_NAMES = {
    "preference": ("chosen", "rejected"),
    "unpaired_preference": ("rated response", "response to another prompt"),
    "retrieval": ("query", "positive", "negative"),  # or several negatives
    "ranking": ("positive", "negative"),
}
HASHES = ("role", "text", "query")  # features of texts that say nothing to a reader


KINDS = (None, REASONING, CALL, RESULT, ANSWER)

LEGEND = {
    None: "trained on",
    REASONING: "reasoning",
    CALL: "tool call",
    RESULT: "tool result",
    ANSWER: "response that is not trained on",
}


class Marks(NamedTuple):
    """Marks around spans of text.

    Attributes:
        runs: Whether tokens are targets -> what is before and after a run of them.
        fields: (field or None, whether it is a target) -> what is before and after a part of a run.
        legend: The first line.
    """

    runs: dict[bool, tuple[str, str]]
    fields: dict[tuple[str | None, bool], tuple[str, str]]
    legend: str


def _colors() -> Marks:
    codes = dict(zip(KINDS, ("32", "36", "35", "34", "33"), strict=True))  # green, cyan, magenta, blue, yellow
    fields = {(kind, True): (f"\x1b[{code}m", "\x1b[0m") for kind, code in codes.items()}
    fields |= {(kind, False): (f"\x1b[2;{code}m", "\x1b[0m") for kind, code in codes.items()}
    fields |= {(None, False): ("\x1b[2m", "\x1b[0m")}
    words = {(kind, True): LEGEND[kind] for kind in (None, REASONING, CALL)}
    words |= {(None, False): "prompt", (RESULT, False): LEGEND[RESULT], (ANSWER, False): LEGEND[ANSWER]}
    legend = ", ".join(f"{fields[key][0]}{word}{fields[key][1]}" for key, word in words.items())
    return Marks(dict.fromkeys((True, False), ("", "")), fields, f"{legend}; dim: not trained on; ×N: with weight N")


def _brackets() -> Marks:
    fields = {(kind, is_target): (f"«{kind}: ", "»") for kind in KINDS[1:] for is_target in (True, False)}
    fields |= {(None, is_target): ("", "") for is_target in (True, False)}
    names = ", ".join(f"«{kind}: ...»" for kind in KINDS[1:])
    legend = f"⟦trained on, ×N: with weight N⟧, {names}; an answer is a {LEGEND[ANSWER]}"
    return Marks({True: ("⟦", "⟧"), False: ("", "")}, fields, legend)


COLORS, BRACKETS = _colors(), _brackets()


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
        marks: Marks around targets, fields and other text.

    Raises:
        ConfigError: An option does not fit the model or the data.
        DataError: A data row cannot be used.
    """
    run = dry_run(config)
    loader = _loader(run, split)
    yield marks.legend
    previews = list(_training(loader, n_examples) if split == "train" else _evaluation(loader, n_examples))
    selected = set.union(*(preview.selected for preview in previews))
    entries = [*config.datasets, *config.eval_datasets]
    fields = read_fields(loader.examples, selected, entries, run.loss.data_kind, run.template)
    for preview in previews:
        if not preview.selected.isdisjoint(itertools.chain.from_iterable(preview.rows)):
            yield from _batch(loader.batch(preview.rows), preview, loader, run, marks, fields)


def describe_examples(config: Config, n_examples: int = 4, split: str = "train") -> list[dict[str, Any]]:
    """Return the first examples as JSON: their row, and the ids, the text and the targets of each document.

    The arguments and errors are those of `inspect`.
    """
    run = dry_run(config)
    loader = _loader(run, split)
    n, examples = min(n_examples, len(loader.examples)), []
    for i in range(n) if split == "eval" else loader.order(0)[:n].tolist():
        documents = [
            {
                "text": decode(run.template.tokenizer, document.ids.tolist()),
                "ids": document.ids.tolist(),
                "is_target": document.mask.bool().tolist(),
                **{name: float(value) for name, value in document.doc_features.items()},
                **{name: values.tolist() for name, values in document.token_features.items()},
            }
            for document in loader.examples[i]
        ]
        examples.append({"where": loader.examples.where(i), "documents": documents})
    return examples


def _loader(run: Preparation, split: str) -> MicrobatchLoader:
    loader = run.train_loader if split == "train" else run.eval_loader
    if loader is None:
        raise ConfigError(
            "--split: the config has no evaluation data. Set eval_datasets or validation_split.", "no-data"
        )
    return loader


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
        yield BatchPreview(f"evaluation, batch {number}", rows, set(range(min(n_examples, len(loader.examples)))))


def _batch(
    batch: Batch,
    preview: BatchPreview,
    loader: MicrobatchLoader,
    run: Preparation,
    marks: Marks,
    fields: dict[int, RowFields],
) -> Iterator[str]:
    """Yield lines about the batch rows with chosen examples."""
    n_rows, n_columns = batch.input_ids.shape
    padding = batch.input_ids.numel() - batch.n_tokens
    percent = f"{100 * padding / batch.input_ids.numel():.1f}%"
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
            known = fields.get(example, RowFields())
            text, turns = _text(batch, d, run.template.tokenizer, marks, known)
            name = _document_name(run.loss.data_kind, number, len(loader.examples[example]), turns)
            phrases = _numbers(batch, d) + _values(batch, d, loader.examples.caches[0].labels)
            phrases += [f"keys that are not used: {', '.join(known.unread)}"] if known.unread else []
            yield f"  {redact(loader.examples.where(example))}{name}: {'; '.join(phrases)}"
            yield "    " + text.replace("\n", "\n    ")
        if n_others := row_of_document.count(row) - len(documents_of_row):
            yield f"  {n_others} other documents"
        if padding := int((batch.doc_ids[row] < 0).sum()):
            yield f"  {padding} padding"


def _document_name(example_type: str, number: int, n_documents: int, turns: str) -> str:
    """Return the name of a document if its example has several."""
    if example_type in DOCUMENT_NAMES:
        names = DOCUMENT_NAMES[example_type]
        return f", {names[min(number, len(names) - 1)]}"
    return f", {turns or f'document {number + 1} of {n_documents}'}" if turns or n_documents > 1 else ""


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
        if math.isnan(number) or name in HASHES:  # a rollout without a reward
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


def _text(batch: Batch, d: int, tokenizer, marks: Marks, known: RowFields) -> tuple[str, str]:
    """Return the text of a document with special tokens, and the turns that it trains on, in words.

    A shared prefix is decoded with the document, but not shown.
    """
    row, start, stop = batch.spans[d].tolist()
    before = batch.input_ids[row, slice(*batch.prefixes[d].tolist())].tolist() if batch.prefixes is not None else []
    ids = before + batch.input_ids[row, start:stop].tolist()
    spans, turns = find_document(known, decode(tokenizer, ids), tokenizer.bos_token)
    text, read = "", decode(tokenizer, before)
    for end, weight in _runs(batch, row, start, stop):
        until = decode(tokenizer, ids[: len(before) + end])
        left, right = marks.runs[weight > 0]
        number = f"×{weight:g} " if weight not in (0, 1) else ""
        text += left + number + _mark_fields(until, len(read), weight > 0, spans, marks) + right
        read = until
    return text, turns


def _mark_fields(text: str, start: int, is_target: bool, spans: list[Span], marks: Marks) -> str:
    """Return the text from `start` with marks around its fields."""
    spans = [span for span in spans if not (is_target and span.kind == ANSWER)]
    borders = sorted({start, len(text), *(i for span in spans for i in span[:2] if start < i < len(text))})
    marked = ""
    for a, b in itertools.pairwise(borders):
        kind = next((span.kind for span in spans if span.start <= a < span.stop), None)
        left, right = marks.fields[kind, is_target]
        marked += left + escape(text[a:b]) + right
    return marked


def _runs(batch: Batch, row: int, start: int, stop: int) -> list[tuple[int, float]]:
    """Return (end, weight in the loss) of each run of tokens of a document with the same weight, 0 for no target."""
    weights = (batch.labels[row, start:stop] != IGNORE_INDEX).numpy().astype(np.float32)  # [T]
    if TARGET_WEIGHTS in batch.token_features:
        weights *= batch.token_features[TARGET_WEIGHTS][row, start:stop].numpy()
    ends = [*(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    return [(end, float(weights[end - 1])) for end in ends]


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
