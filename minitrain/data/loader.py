"""Build the micro-batches of each optimizer step, and the batches of an evaluation, from data files.

The position in the order of an epoch is one integer: the number of examples consumed over all ranks.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from minitrain.batch import TARGET_WEIGHTS, Batch, Document, collate
from minitrain.config.schema import Config
from minitrain.errors import ConfigError

from .cache import TokenCache, load_cache
from .counts import BAD_ROWS, OF_ROWS, describe_counts, describe_fields, describe_unread, of_rows
from .mismatched import add_mismatched_responses
from .prefetch import T, prefetch
from .sampler import (
    BatchRows,
    Sizes,
    epoch_order,
    epoch_size,
    group_by_length,
    pack,
    plan_step,
    plan_within,
    split_within,
)
from .source import row_name
from .template import Template


class TokenizedDataset:
    """Examples of several token caches as one sequence.

    Attributes:
        weights: How often the examples of each file occur in an epoch.
        selected: Indices of the examples to use from each cache; by default, all that are trained on.
        sizes: Number of selected examples per file.
        starts: Index of each file's first example, and the number of examples, shape [files + 1].
        lengths: Tokens of each example, shape [E].
    """

    def __init__(self, caches: list[TokenCache], weights: list[float], selected: list[np.ndarray] | None = None):
        self.caches, self.weights = caches, weights
        self.selected = selected or [cache.trained for cache in caches]
        self.sizes = [len(indices) for indices in self.selected]
        self.starts = np.cumsum([0, *self.sizes])
        pairs = zip(caches, self.selected, strict=True)
        self.lengths = np.concatenate([cache.lengths[indices] for cache, indices in pairs])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> list[Document]:
        """Return the documents of one example."""
        cache, number = self.locate(index)
        return cache[number]

    def where(self, index: int) -> str:
        """Return `file:line` of one example."""
        cache, number = self.locate(index)
        return row_name(cache.source, cache.lines[number])

    def digest(self, indices: list[int]) -> str:
        """Return a hash of the ids, masks and weights of examples, which does not depend on packing."""
        digest = hashlib.blake2b(digest_size=8)
        arrays = [(cache.ids.numpy(), cache.mask.numpy(), cache.bounds, _weights(cache)) for cache in self.caches]
        files = np.searchsorted(self.starts, indices, side="right") - 1
        for file, i in zip(files.tolist(), (indices - self.starts[files]).tolist(), strict=True):
            ids, mask, bounds, weights = arrays[file]
            number = self.selected[file][i]
            span = slice(bounds[number], bounds[number + 1])
            digest.update(ids[span])
            digest.update(mask[span])
            if weights is not None and (weighted := weights[span] * mask[span]).tolist() != mask[span].tolist():
                digest.update(weighted)
        return digest.hexdigest()

    def locate(self, index: int) -> tuple[TokenCache, int]:
        """Return the cache of an example, and its number there."""
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.caches[file], int(self.selected[file][index - self.starts[file]])

    def split(self, held_out: float, seed: int) -> tuple["TokenizedDataset", "TokenizedDataset"]:
        """Return (training examples, held-out examples). The same seed gives the same random split.

        Args:
            held_out: Fraction below 1, or number of examples.
        """
        n = len(self)
        n_held_out = int(held_out) if held_out >= 1 else max(1, round(n * held_out))
        if n_held_out >= n:
            raise ConfigError(
                f"validation_split: holds out {n_held_out} of {n} examples, which leaves none to train on. Lower it.",
                "no-data",
            )
        is_held_out = np.zeros(n, bool)
        is_held_out[np.random.Generator(np.random.PCG64([seed, 2])).permutation(n)[:n_held_out]] = True
        masks = np.split(is_held_out, self.starts[1:-1])
        train = [indices[~mask] for indices, mask in zip(self.selected, masks, strict=True)]
        held = [indices[mask] for indices, mask in zip(self.selected, masks, strict=True)]
        return self._select(train), self._select(held)

    def _select(self, selected: list[np.ndarray]) -> "TokenizedDataset":
        """Return the data set with other examples selected, without the caches that have none."""
        used = [i for i, indices in enumerate(selected) if len(indices)]
        return TokenizedDataset(
            [self.caches[i] for i in used], [self.weights[i] for i in used], [selected[i] for i in used]
        )

    def per_example(self, numbers: Callable[[TokenCache], np.ndarray], reduce: np.ufunc) -> np.ndarray:
        """Return one number per example, shape [E], which `reduce` computes from those of its documents.

        Args:
            numbers: Returns one number per document of a cache, shape [D].
        """
        pairs = zip(self.caches, self.selected, strict=True)
        return np.concatenate([reduce.reduceat(numbers(c), c.first_documents[:-1])[indices] for c, indices in pairs])

    def document_sizes(self, index: int, shares_prompts: bool) -> list[int]:
        """Return how many tokens of each document of an example a batch has."""
        cache, number = self.locate(index)
        first, stop = cache.first_documents[number : number + 2]
        sizes = np.diff(cache.offsets[first : stop + 1])
        return (sizes - cache.shared[first:stop] if shares_prompts else sizes).tolist()

    def first(self, n: int | None) -> "TokenizedDataset":
        """Return the first n examples in the order of the files; None: all."""
        if n is None or n >= len(self):
            return self
        ends = np.clip(n - self.starts[:-1], 0, None)
        return self._select([indices[:end] for indices, end in zip(self.selected, ends, strict=True)])


@dataclass
class Data:
    """The data of a run.

    Attributes:
        retention: The conversations of `retention_datasets`.
        summary: Lines about rows that were skipped, dropped or truncated, and about what rows have besides text.
        warnings: Lines about files that lost more than a third of their rows in one of these ways.
    """

    train: TokenizedDataset
    eval: TokenizedDataset | None
    summary: list[str]
    warnings: list[str]
    retention: TokenizedDataset | None = None


def load_data(config: Config, template: Template, kind: str = "conversation", partners: bool = True) -> Data:
    """Load and tokenize all data files of a config.

    Args:
        kind: The kind of examples that the loss needs, a key of `EXAMPLE_COLUMNS`.
        partners: Add a response to another prompt to each unpaired preference.

    Raises:
        DataError: A file or row cannot be used.
        ConfigError: No example is left to train on.
    """
    all_caches: list[TokenCache] = []

    def read(entries, kind: str = kind) -> TokenizedDataset:
        caches = [load_cache(entry, template, config, kind) for entry in entries]
        all_caches.extend(caches)
        if kind == "unpaired_preference" and partners:
            caches = add_mismatched_responses(caches, config)
        return TokenizedDataset(caches, [entry.weight for entry in entries])

    train, evaluation = read(config.datasets), None
    if config.eval_datasets:
        evaluation = read(config.eval_datasets)
    elif config.validation_split:
        train, evaluation = train.split(config.validation_split, config.seed)
    _align_weights(all_caches)
    retention = read(config.retention_datasets, "conversation") if config.retention_datasets else None
    if retention:
        _align_weights(retention.caches)
    summary = [f"{cache.source}: {line}" for cache in all_caches for line in _notes(cache)]
    warnings = [line for cache in all_caches for line in _warnings(cache, config)]
    evaluation, retention = (data.first(config.n_eval_examples) if data else None for data in (evaluation, retention))
    return Data(train, evaluation, summary, warnings, retention)


def _weights(cache: TokenCache) -> np.ndarray | None:
    return cache.token_features[TARGET_WEIGHTS].numpy() if TARGET_WEIGHTS in cache.token_features else None


def _align_weights(caches: list[TokenCache]) -> None:
    """Give weights of 1 to the tokens of files that have none, if another file has weights."""
    if any(TARGET_WEIGHTS in cache.token_features for cache in caches):
        for cache in caches:
            cache.token_features.setdefault(TARGET_WEIGHTS, torch.ones(1).expand(len(cache.ids)))


def _notes(cache: TokenCache) -> Iterator[str]:
    yield from describe_counts(cache.counts, cache.n_rows)
    yield from filter(None, (describe_fields(cache.counts), describe_unread(cache.counts)))


def _warnings(cache: TokenCache, config: Config) -> Iterator[str]:
    for key, count in cache.counts.items():
        if count * 3 > cache.n_rows and key in OF_ROWS:
            advice = "Fix the rows." if key == BAD_ROWS else f"Raise max_length={config.max_length}."
            fraction = of_rows(key, count, cache.n_rows)
            yield f"{cache.source}: {count:,} {OF_ROWS[key]}{fraction}, more than a third. {advice}"


@dataclass
class MicrobatchLoader:
    """Yields the micro-batches of one rank for each optimizer step.

    Attributes:
        row_capacity: Tokens per packed row, for attention whose cost is quadratic in the row's length; None: no limit.
        shares_prompts: Whether a batch has the common prompt of an example's documents only once, which requires
            minitrain's own attention.
        prefetch: Whether a thread prepares the next step's batches, in pinned memory if there is a CUDA device.
    """

    examples: TokenizedDataset
    config: Config
    pad_token_id: int
    rank: int = 0
    world_size: int = 1
    row_capacity: int | None = None
    shares_prompts: bool = False
    prefetch: bool = False

    @property
    def epoch_size(self) -> int:
        """Number of examples in one epoch, over all ranks."""
        return epoch_size(self.examples.sizes, self.examples.weights)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.epoch_size / self.config.total_batch_size)

    @property
    def total_steps(self) -> int:
        return self.config.n_steps or max(1, math.ceil(self.config.n_epochs * self.steps_per_epoch))

    def steps(self, consumed: int = 0) -> Iterator[tuple[list[int], list[Batch]]]:
        """Yield (example indices of the step over all ranks, this rank's micro-batches), without end.

        Args:
            consumed: Number of examples to skip, over all ranks, when a run resumes.
        """
        return self.prefetched(self._steps(consumed))

    def _steps(self, consumed: int) -> Iterator[tuple[list[int], list[Batch]]]:
        while True:
            epoch, position = divmod(consumed, self.epoch_size)
            order = self.order(epoch)
            while position < len(order):
                indices = order[position : position + self.config.total_batch_size]
                yield indices.tolist(), self.micro_batches(indices)
                position += len(indices)
                consumed += len(indices)

    def prefetched(self, items: Iterator[T]) -> Iterator[T]:
        """Return the items, computed ahead if this loader prefetches."""
        return prefetch(items) if self.prefetch else items

    def state(self, consumed: int) -> tuple[dict, dict[str, torch.Tensor]]:
        """Return values and tensors that a checkpoint holds besides `consumed`; none for data files."""
        return {}, {}

    def restore(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""

    def order(self, epoch: int) -> np.ndarray:
        """Return the example indices of an epoch, shape [epoch_size]."""
        config, examples = self.config, self.examples
        order = epoch_order(examples.sizes, examples.weights, config.seed, epoch)
        if config.group_by_length:
            order = group_by_length(order, examples.lengths, config.total_batch_size, config.seed, epoch)
        return order

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens that a batch has of each example, shape [E]."""
        if self.shares_prompts:
            return self.examples.lengths
        return self.examples.per_example(lambda cache: np.diff(cache.offsets), np.add)

    @functools.cached_property
    def sizes(self) -> Sizes:
        """The sizes of all examples as a batch has them."""
        documents = self.examples.per_example(lambda cache: np.ones(len(cache.offsets) - 1, np.int64), np.add)
        longest = self.examples.per_example(lambda cache: np.diff(cache.offsets), np.maximum)
        return Sizes(self.lengths, documents, longest)

    def describe_too_long(self) -> str | None:
        """Return a message if examples exceed `max_tokens_per_micro_batch`, or None."""
        budget = self.config.max_tokens_per_micro_batch
        padded = self.sizes.n_documents * self.sizes.longest
        lengths = self.lengths if self.config.packing else padded
        if budget is None or lengths.max() <= budget:
            return None
        return (
            f"max_tokens_per_micro_batch={budget}: {(lengths > budget).sum():,} of {len(lengths):,} examples have more "
            f"tokens, up to {lengths.max():,}. Each of them is a micro-batch of its own."
        )

    def micro_batches(self, indices: np.ndarray) -> list[Batch]:
        """Return this rank's micro-batches of one step. All ranks have the same number of them."""
        return [self.batch(rows) for rows in self.layout(indices)]

    def layout(self, indices: np.ndarray) -> list[BatchRows]:
        """Return the examples of one step by [micro-batch][row] of this rank."""
        return self.plan(indices)[self.rank]

    def plan(self, indices: np.ndarray) -> list[list[BatchRows]]:
        """Return the examples of one step by [rank][micro-batch][row]."""
        config, budget = self.config, self.config.max_tokens_per_micro_batch
        if budget is None:
            n_micro = config.gradient_accumulation_steps
            plan = plan_step(self.lengths[indices], self.world_size, n_micro, config.packing, self.row_capacity)
        else:
            plan = plan_within(self.sizes.at(indices), self.world_size, budget, config.packing, self.row_capacity)
        return [[[[int(indices[i]) for i in row] for row in rows] for rows in micro_batches] for micro_batches in plan]

    def epoch_plan(self) -> Iterator[list[list[BatchRows]]]:
        """Yield the plan of each step of the first epoch."""
        order, size = self.order(0), self.config.total_batch_size
        return (self.plan(order[start : start + size]) for start in range(0, len(order), size))

    def widths(self, batches: Iterable[BatchRows]) -> Iterator[list[int]]:
        """Yield the number of tokens in each row of each batch, without building the batches."""
        for rows in batches:
            sizes = [[self.examples.document_sizes(example, self.shares_prompts) for example in row] for row in rows]
            if self.config.packing:
                yield [sum(map(sum, row)) for row in sizes]
            else:
                yield [size for row in sizes for example in row for size in example]

    def eval_batches(self) -> Iterator[Batch]:
        """Return this rank's batches of an evaluation, longest first. All ranks have the same number of them."""
        return self.prefetched(self.batch(rows) for rows in self.eval_layout())

    def single_batches(self) -> Iterator[Batch]:
        """Return a batch for each example, in their order, on one rank."""
        return (self.batch([[i]]) for i in range(len(self.examples)))

    def eval_layout(self) -> Iterator[BatchRows]:
        """Yield the examples of each of this rank's evaluation batches by row."""
        config, lengths = self.config, self.lengths
        order, budget = np.argsort(-lengths, kind="stable"), config.max_tokens_per_micro_batch
        if budget is None:
            parts = np.array_split(order, math.ceil(len(lengths) / (config.eval_batch_size * self.world_size)))
        else:
            is_packed = config.packing and self.row_capacity is None
            sizes = self.sizes.at(order)
            slices = split_within(sizes, self.world_size, budget, is_packed, config.eval_batch_size)
            parts = [order[part] for part in slices]
        for part in parts:
            mine = part[self.rank :: self.world_size]
            rows = [[int(i)] for i in mine]
            if config.packing and len(mine):
                rows = [[int(mine[i]) for i in row] for row in pack(lengths[mine], self.row_capacity)]
            yield rows

    def batch(self, rows: list[list[int]]) -> Batch:
        """Return the batch with these examples in its rows. Without packing, each document has its own row."""
        documents = [[document for i in row for document in self.examples[i]] for row in rows]
        if not self.config.packing:
            documents = [[document] for row in documents for document in row]
        if not self.shares_prompts:
            documents = [[dataclasses.replace(document, shared=0) for document in row] for row in documents]
        batch = collate(documents, self.pad_token_id)
        return batch.pin_memory() if self.prefetch and torch.cuda.is_available() else batch
