"""Build the micro-batches of each optimizer step, and the batches of an evaluation, from data files.

The functions for the order of examples, their packing into batch rows, and their split over ranks are pure. The order
depends on (seed, epoch) only, and the position in it is one integer: the number of examples consumed over all ranks.
The layout of an optimizer step (sorting, packing, split over ranks and micro-batches) does not change the gradient, so
it may depend on anything.
"""

import dataclasses
import hashlib
import heapq
import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from minitrain.batch import Batch, Document, collate
from minitrain.config.schema import Config
from minitrain.errors import ConfigError

from .cache import BAD_ROWS, COUNTED, TokenCache, load_cache
from .mismatched import add_mismatched_responses
from .source import row_name
from .template import Template

WINDOW_STEPS = 64  # group_by_length sorts within windows of this many steps

BatchRows = list[list[int]]  # for each row of a micro-batch, the indices of its examples


def epoch_size(sizes: list[int], weights: list[float]) -> int:
    """Return the number of examples in an epoch that uses each data set `weight` times."""
    return sum(_n_examples(size, weight) for size, weight in zip(sizes, weights, strict=True))


def epoch_order(sizes: list[int], weights: list[float], seed: int, epoch: int) -> np.ndarray:
    """Return the order of one epoch, as indices into the concatenated data sets, shape [epoch_size], int64.

    With a weight of 2.5, each example occurs twice, and a random half of them, drawn for each epoch, a third time.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    parts, start = [], 0
    for size, weight in zip(sizes, weights, strict=True):
        n_repeats, n_extra = divmod(_n_examples(size, weight), size)
        parts += [np.arange(start, start + size)] * n_repeats + [start + generator.permutation(size)[:n_extra]]
        start += size
    order = np.concatenate(parts)
    generator.shuffle(order)
    return order.astype(np.int64)


def group_by_length(order: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order with examples of similar length in each batch, and the batches in random order."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch, 1]))
    grouped = []
    for window in np.split(order, range(batch_size * WINDOW_STEPS, len(order), batch_size * WINDOW_STEPS)):
        by_length = window[np.argsort(lengths[window], kind="stable")]
        full = len(by_length) // batch_size * batch_size
        batches = by_length[:full].reshape(-1, batch_size)
        # Only the last window can have an incomplete batch, which stays at the end: only the last step may be short.
        grouped += [batches[generator.permutation(len(batches))].reshape(-1), by_length[full:]]
    return np.concatenate(grouped)


def plan_step(
    lengths: np.ndarray, world_size: int, n_micro: int, packing: bool, row_capacity: int | None = None
) -> list[list[BatchRows]]:
    """Split the examples 0..n-1 of one optimizer step over ranks, micro-batches and rows.

    All ranks get the same number of micro-batches; if there are few rows, fewer than `n_micro`, or empty ones. Without
    packing, examples of similar length share a micro-batch, which saves padding, and each micro-batch is dealt to the
    ranks in turn, which balances their work.

    Args:
        lengths: Tokens of each example, shape [n].
        n_micro: Micro-batches per rank, at most.
        row_capacity: Tokens per packed row, see `pack`.

    Returns:
        Example indices by [rank][micro-batch][row].
    """
    if packing and row_capacity is None:
        n_micro = min(n_micro, math.ceil(len(lengths) / world_size))
        bins = balance_by_tokens(lengths, world_size * n_micro)
        return [[[row] if row else [] for row in bins[rank::world_size]] for rank in range(world_size)]
    rows = pack(lengths, row_capacity) if packing else [[i] for i in np.argsort(-lengths, kind="stable").tolist()]
    n_micro = min(n_micro, math.ceil(len(rows) / world_size))
    cuts = [round(i * len(rows) / n_micro) for i in range(n_micro + 1)]
    parts = [rows[a:b] for a, b in itertools.pairwise(cuts)]
    return [[part[rank::world_size] for part in parts] for rank in range(world_size)]


def pack(lengths: np.ndarray, row_capacity: int | None) -> BatchRows:
    """Pack examples into rows of at most `row_capacity` tokens, or of the longest example; None: into one row."""
    if row_capacity is None:
        return [list(range(len(lengths)))]
    return best_fit(lengths, max(row_capacity, int(lengths.max())))


def balance_by_tokens(lengths: np.ndarray, n_bins: int) -> BatchRows:
    """Assign examples, longest first, to the bin with the fewest tokens so far, which balances the bins."""
    bins: BatchRows = [[] for _ in range(n_bins)]
    fill = [(0, b) for b in range(n_bins)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        tokens, b = heapq.heappop(fill)
        bins[b].append(index)
        heapq.heappush(fill, (tokens + int(lengths[index]), b))
    return bins


def best_fit(lengths: np.ndarray, capacity: int) -> BatchRows:
    """Pack by best-fit decreasing: each example goes into the fullest row that has space for it."""
    rows: BatchRows = []
    space: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        fit = bisect_left(space, (length, -1))
        if fit == len(space):
            rows.append([index])
            insort(space, (capacity - length, len(rows) - 1))
        else:
            free, row = space.pop(fit)
            rows[row].append(index)
            insort(space, (free - length, row))
    return rows


def _n_examples(size: int, weight: float) -> int:
    return max(1, round(size * weight))


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
        cache, number = self._locate(index)
        return cache[number]

    def where(self, index: int) -> str:
        """Return `file:line` of one example."""
        cache, number = self._locate(index)
        return row_name(cache.source, cache.lines[number])

    def digest(self, indices: list[int]) -> str:
        """Return a hash of the ids and masks of examples, which does not depend on packing."""
        digest = hashlib.blake2b(digest_size=8)
        arrays = [(cache.ids.numpy(), cache.mask.numpy(), cache.bounds) for cache in self.caches]
        files = np.searchsorted(self.starts, indices, side="right") - 1
        for file, i in zip(files.tolist(), (indices - self.starts[files]).tolist(), strict=True):
            ids, mask, bounds = arrays[file]
            number = self.selected[file][i]
            digest.update(ids[bounds[number] : bounds[number + 1]])
            digest.update(mask[bounds[number] : bounds[number + 1]])
        return digest.hexdigest()

    def _locate(self, index: int) -> tuple[TokenCache, int]:
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

    def per_document(self, numbers: Callable[[TokenCache], np.ndarray]) -> np.ndarray:
        """Gather one number per document, shape [E, documents per example], from a function of each cache -> [D]."""
        pairs = zip(self.caches, self.selected, strict=True)
        return np.concatenate([numbers(cache).reshape(-1, cache.n_documents)[indices] for cache, indices in pairs])

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
        summary: Lines about rows that were skipped, dropped or truncated.
        warnings: Lines about files that lost more than a third of their rows in one of these ways.
    """

    train: TokenizedDataset
    eval: TokenizedDataset | None
    summary: list[str]
    warnings: list[str]


def load_data(config: Config, template: Template, kind: str = "conversation") -> Data:
    """Load and tokenize all data files of a config.

    Args:
        kind: The kind of examples that the loss needs, a key of `N_DOCUMENTS`.

    Raises:
        DataError: A file or row cannot be used.
        ConfigError: No example is left to train on.
    """
    all_caches: list[TokenCache] = []

    def read(entries) -> TokenizedDataset:
        caches = [load_cache(entry, template, config, kind) for entry in entries]
        all_caches.extend(caches)
        if kind == "unpaired_preference":
            caches = add_mismatched_responses(caches, config)
        return TokenizedDataset(caches, [entry.weight for entry in entries])

    train, evaluation = read(config.datasets), None
    if config.eval_datasets:
        evaluation = read(config.eval_datasets)
    elif config.validation_split:
        train, evaluation = train.split(config.validation_split, config.seed)
    summary = [
        f"{cache.source}: {line}" for cache in all_caches for line in describe_counts(cache.counts, cache.n_rows)
    ]
    warnings = [line for cache in all_caches for line in _warnings(cache, config)]
    return Data(train, evaluation.first(config.n_eval_examples) if evaluation else None, summary, warnings)


def describe_counts(counts: dict[str, int], n_rows: int) -> list[str]:
    """Return a line for each count of skipped, dropped or truncated rows, with its fraction of `n_rows`."""
    return [f"{count:,} {COUNTED[key]}{_of_rows(key, count, n_rows)}" for key, count in counts.items()]


def _warnings(cache: TokenCache, config: Config) -> Iterator[str]:
    for key, count in cache.counts.items():
        if count * 3 > cache.n_rows and key != "untrained-turns":
            advice = "Fix the rows." if key == BAD_ROWS else f"Raise max_length={config.max_length}."
            fraction = _of_rows(key, count, cache.n_rows)
            yield f"{cache.source}: {count:,} {COUNTED[key]}{fraction}, more than a third. {advice}"


def _of_rows(key: str, count: int, n_rows: int) -> str:
    """Return a count's fraction of the rows; nothing for turns, of which a row can have several."""
    return "" if key == "untrained-turns" else f" of {n_rows:,} ({100 * count / n_rows:.1f} %)"


@dataclass
class MicrobatchLoader:
    """Yields the micro-batches of one rank for each optimizer step.

    Attributes:
        row_capacity: Tokens per packed row, for attention whose cost is quadratic in the row's length; None: no limit.
        shares_prompts: Whether a batch has the common prompt of an example's documents only once, which requires
            minitrain's own attention.
    """

    examples: TokenizedDataset
    config: Config
    pad_token_id: int
    rank: int = 0
    world_size: int = 1
    row_capacity: int | None = None
    shares_prompts: bool = False

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
        while True:
            epoch, position = divmod(consumed, self.epoch_size)
            order = self.order(epoch)
            while position < len(order):
                indices = order[position : position + self.config.total_batch_size]
                yield indices.tolist(), self.micro_batches(indices)
                position += len(indices)
                consumed += len(indices)

    def order(self, epoch: int) -> np.ndarray:
        """Return the example indices of an epoch, shape [epoch_size]."""
        config, examples = self.config, self.examples
        order = epoch_order(examples.sizes, examples.weights, config.seed, epoch)
        if config.group_by_length:
            order = group_by_length(order, examples.lengths, config.total_batch_size, config.seed, epoch)
        return order

    def micro_batches(self, indices: np.ndarray) -> list[Batch]:
        """Return this rank's micro-batches of one step. All ranks have the same number of them."""
        return [self.batch(rows) for rows in self.layout(indices)]

    def layout(self, indices: np.ndarray) -> list[BatchRows]:
        """Return the examples of one step by [micro-batch][row] of this rank."""
        return self.plan(indices)[self.rank]

    def plan(self, indices: np.ndarray) -> list[list[BatchRows]]:
        """Return the examples of one step by [rank][micro-batch][row]."""
        n_micro = self.config.gradient_accumulation_steps
        lengths, packing = self.examples.lengths[indices], self.config.packing
        plan = plan_step(lengths, self.world_size, n_micro, packing, self.row_capacity)
        return [[[[int(indices[i]) for i in row] for row in rows] for rows in micro_batches] for micro_batches in plan]

    def epoch_plan(self) -> Iterator[list[list[BatchRows]]]:
        """Yield the plan of each step of the first epoch."""
        order, size = self.order(0), self.config.total_batch_size
        return (self.plan(order[start : start + size]) for start in range(0, len(order), size))

    def widths(self, batches: Iterable[BatchRows]) -> Iterator[list[int]]:
        """Yield the number of tokens in each row of each batch, without building the batches."""
        lengths = self.examples.per_document(lambda cache: np.diff(cache.offsets))  # [E, documents per example]
        if self.shares_prompts:
            lengths = lengths - self.examples.per_document(lambda cache: cache.shared)
        for rows in batches:
            if self.config.packing:
                yield [int(lengths[row].sum()) for row in rows]
            else:
                yield lengths[[example for row in rows for example in row]].reshape(-1).tolist()

    def eval_batches(self) -> Iterator[Batch]:
        """Return this rank's batches of an evaluation, longest first. All ranks have the same number of them."""
        return map(self.batch, self.eval_layout())

    def eval_layout(self) -> Iterator[BatchRows]:
        """Yield the examples of each of this rank's evaluation batches by row."""
        lengths = self.examples.lengths
        n = math.ceil(len(lengths) / (self.config.eval_batch_size * self.world_size))
        by_length = np.argsort(-lengths, kind="stable")
        for part in np.array_split(by_length, n):
            mine = part[self.rank :: self.world_size]
            rows = [[int(i)] for i in mine]
            if self.config.packing and len(mine):
                rows = [[int(mine[i]) for i in row] for row in pack(lengths[mine], self.row_capacity)]
            yield rows

    def batch(self, rows: list[list[int]]) -> Batch:
        """Return the batch with these examples in its rows. Without packing, each document has its own row."""
        documents = [[document for i in row for document in self.examples[i]] for row in rows]
        if not self.config.packing:
            documents = [[document] for row in documents for document in row]
        if not self.shares_prompts:
            documents = [[dataclasses.replace(document, shared=0) for document in row] for row in documents]
        return collate(documents, self.pad_token_id)
