"""Data files -> the micro-batches of each optimizer step, and the batches of an evaluation.

The order of examples, their packing into rows and the share of each rank are pure functions. The order is a function of
(seed, epoch) alone and the position in it one integer, the number of examples consumed over all ranks. How the examples
of one optimizer step are laid out (sorted, packed, split over ranks and micro-batches) does not change the gradient, so
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
from .mismatched import add_mismatched_answers
from .source import row_name
from .template import Template

WINDOW_STEPS = 64  # group_by_length sorts inside a window of so many steps

Rows = list[list[int]]  # the documents of each row of a micro-batch


def epoch_size(sizes: list[int], weights: list[float]) -> int:
    """Examples in an epoch over data sets of these sizes, each seen `weight` times."""
    return sum(_times(size, weight) for size, weight in zip(sizes, weights, strict=True))


def epoch_order(sizes: list[int], weights: list[float], seed: int, epoch: int) -> np.ndarray:
    """Indices into the concatenated data sets in the order of one epoch -> [epoch_size] int64.

    A weight of 2.5 takes every example twice and half of them, another half each epoch, a third time.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    parts, start = [], 0
    for size, weight in zip(sizes, weights, strict=True):
        whole, rest = divmod(_times(size, weight), size)
        parts += [np.arange(start, start + size)] * whole + [start + generator.permutation(size)[:rest]]
        start += size
    order = np.concatenate(parts)
    generator.shuffle(order)
    return order.astype(np.int64)


def group_by_length(order: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The order changed so that the examples of one batch are of like length; batches stay in random order."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch, 1]))
    grouped = []
    for window in np.split(order, range(batch_size * WINDOW_STEPS, len(order), batch_size * WINDOW_STEPS)):
        by_length = window[np.argsort(lengths[window], kind="stable")]
        full = len(by_length) // batch_size * batch_size
        batches = by_length[:full].reshape(-1, batch_size)
        # A short rest may stand at the end of the epoch only, where a short step is expected.
        grouped += [batches[generator.permutation(len(batches))].reshape(-1), by_length[full:]]
    return np.concatenate(grouped)


def plan_step(
    lengths: np.ndarray, world_size: int, n_micro: int, packing: bool, row_capacity: int | None = None
) -> list[list[Rows]]:
    """Lays the examples 0..n-1 of one optimizer step out -> [rank][micro-batch][row][document].

    Every rank gets the same number of micro-batches, fewer than `n_micro` where there are not as many rows; at the
    short end of an epoch a rank's may be empty. Without packing, examples of like length share a micro-batch, which
    saves padding; ranks take turns in each, so that they have like amounts of work. See `pack` for the rest.
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


def pack(lengths: np.ndarray, row_capacity: int | None) -> Rows:
    """Documents in one row without padding, or, where attention costs the square of a row, in rows of a capacity.

    The capacity is raised to the longest document.
    """
    if row_capacity is None:
        return [list(range(len(lengths)))]
    return best_fit(lengths, max(row_capacity, int(lengths.max())))


def balance_by_tokens(lengths: np.ndarray, n_bins: int) -> Rows:
    """Deals documents, longest first, each to the bin with the fewest tokens, so that all have about as many."""
    bins: Rows = [[] for _ in range(n_bins)]
    fill = [(0, b) for b in range(n_bins)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        tokens, b = heapq.heappop(fill)
        bins[b].append(index)
        heapq.heappush(fill, (tokens + int(lengths[index]), b))
    return bins


def best_fit(lengths: np.ndarray, capacity: int) -> Rows:
    """Best-fit decreasing: each document goes into the fullest row that still has room for it."""
    rows: Rows = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([index])
            insort(room, (capacity - length, len(rows) - 1))
        else:
            free, row = room.pop(place)
            rows[row].append(index)
            insort(room, (free - length, row))
    return rows


def _times(size: int, weight: float) -> int:
    return max(1, round(size * weight))


class TokenizedDataset:
    """Examples of several token caches, or a choice of them, as one sequence; at first all that are trained on."""

    def __init__(self, caches: list[TokenCache], weights: list[float], chosen: list[np.ndarray] | None = None):
        self.caches, self.weights = caches, weights
        self.chosen = chosen or [cache.trained for cache in caches]
        self.sizes = [len(indices) for indices in self.chosen]
        self.starts = np.cumsum([0, *self.sizes])
        pairs = zip(caches, self.chosen, strict=True)
        self.lengths = np.concatenate([cache.lengths[indices] for cache, indices in pairs])  # [E]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> list[Document]:
        """The documents of one example."""
        cache, number = self._place(index)
        return cache[number]

    def where(self, index: int) -> str:
        """``file:line`` of one example."""
        cache, number = self._place(index)
        return row_name(cache.source, cache.lines[number])

    def digest(self, indices: list[int]) -> str:
        """A hash of the tokens of examples, and of which are learned, however they are laid out in rows."""
        digest = hashlib.blake2b(digest_size=8)
        tokens = [(cache.ids.numpy(), cache.mask.numpy(), cache.bounds) for cache in self.caches]
        which = np.searchsorted(self.starts, indices, side="right") - 1
        for file, place in zip(which.tolist(), (indices - self.starts[which]).tolist(), strict=True):
            ids, mask, bounds = tokens[file]
            number = self.chosen[file][place]
            digest.update(ids[bounds[number] : bounds[number + 1]])
            digest.update(mask[bounds[number] : bounds[number + 1]])
        return digest.hexdigest()

    def _place(self, index: int) -> tuple[TokenCache, int]:
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.caches[which], int(self.chosen[which][index - self.starts[which]])

    def split(self, held_out: float, seed: int) -> tuple["TokenizedDataset", "TokenizedDataset"]:
        """(the rest, a random share or number of examples held out, the same for the same seed)."""
        n = len(self)
        count = int(held_out) if held_out >= 1 else max(1, round(n * held_out))
        if count >= n:
            raise ConfigError(f"validation_split: {count} of {n} examples held out leave none to train on", "no-data")
        mark = np.zeros(n, bool)
        mark[np.random.Generator(np.random.PCG64([seed, 2])).permutation(n)[:count]] = True
        marks = np.split(mark, self.starts[1:-1])
        kept = [indices[~m] for indices, m in zip(self.chosen, marks, strict=True)]
        held = [indices[m] for indices, m in zip(self.chosen, marks, strict=True)]
        return self._of(kept), self._of(held)

    def _of(self, chosen: list[np.ndarray]) -> "TokenizedDataset":
        """The same with other choices; caches of which nothing is chosen are left out."""
        kept = [i for i, indices in enumerate(chosen) if len(indices)]
        return TokenizedDataset(
            [self.caches[i] for i in kept], [self.weights[i] for i in kept], [chosen[i] for i in kept]
        )

    def of_documents(self, numbers: Callable[[TokenCache], np.ndarray]) -> np.ndarray:
        """A number of each document, which a cache has as [D] -> [E, n]."""
        pairs = zip(self.caches, self.chosen, strict=True)
        return np.concatenate([numbers(cache).reshape(-1, cache.n_documents)[chosen] for cache, chosen in pairs])

    def first(self, n: int | None) -> "TokenizedDataset":
        """The first n examples over all files in turn; all of them for None."""
        if n is None or n >= len(self):
            return self
        ends = np.clip(n - self.starts[:-1], 0, None)
        return self._of([indices[:end] for indices, end in zip(self.chosen, ends, strict=True)])


@dataclass
class Data:
    """What a config's files hold: examples to train on, to evaluate on, and what was cut or left out of them.

    `warnings` are about files that lost more than a third in some way.
    """

    train: TokenizedDataset
    eval: TokenizedDataset | None
    notes: list[str]
    warnings: list[str]


def load_data(config: Config, template: Template, kind: str = "conversation") -> Data:
    """Reads all files of a config as records of a kind. Raises DataError or ConfigError."""
    every: list[TokenCache] = []

    def read(entries) -> TokenizedDataset:
        caches = [load_cache(entry, template, config, kind) for entry in entries]
        every.extend(caches)
        if kind == "unpaired_preference":
            caches = add_mismatched_answers(caches, config)
        return TokenizedDataset(caches, [entry.weight for entry in entries])

    train, evaluation = read(config.datasets), None
    if config.eval_datasets:
        evaluation = read(config.eval_datasets)
    elif config.validation_split:
        train, evaluation = train.split(config.validation_split, config.seed)
    notes = [f"{cache.source}: {lost}" for cache in every for lost in describe_losses(cache.counts, cache.n_rows)]
    warnings = [line for cache in every for line in _warnings(cache, config)]
    return Data(train, evaluation.first(config.n_eval_examples) if evaluation else None, notes, warnings)


def describe_losses(counts: dict[str, int], n_rows: int) -> list[str]:
    """Return how many of so many rows were cut or left out, each count with its share of them."""
    return [
        f"{count:,} {COUNTED[what]}{'' if _of_turns(what) else _share(count, n_rows)}" for what, count in counts.items()
    ]


def _warnings(cache: TokenCache, config: Config) -> Iterator[str]:
    for what, count in cache.counts.items():
        if count * 3 > cache.n_rows and not _of_turns(what):
            longer = f"raise max_length={config.max_length}" if what != BAD_ROWS else "look at why they are bad"
            yield f"{cache.source}: {count:,} {COUNTED[what]}{_share(count, cache.n_rows)}, more than a third: {longer}"


def _of_turns(what: str) -> bool:
    """Whether turns are counted, of which a row has several."""
    return what == "unlearned-turns"


def _share(count: int, n_rows: int) -> str:
    return f" of {n_rows:,} ({100 * count / n_rows:.1f} %)"


@dataclass
class MicrobatchLoader:
    """Yields the micro-batches of one rank, optimizer step by optimizer step.

    `row_capacity` bounds packed rows, for attention that costs the square of a row's length; see `pack`.
    `shares_prompts`: what documents of an example have in common is laid out once, which takes our own attention.
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
        """Examples in one epoch, over all ranks."""
        return epoch_size(self.examples.sizes, self.examples.weights)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.epoch_size / self.config.total_batch_size)

    @property
    def total_steps(self) -> int:
        return self.config.n_steps or max(1, math.ceil(self.config.n_epochs * self.steps_per_epoch))

    def steps(self, consumed: int = 0) -> Iterator[tuple[list[int], list[Batch]]]:
        """(example indices of the whole step, this rank's micro-batches) from example `consumed` on, without end."""
        while True:
            epoch, position = divmod(consumed, self.epoch_size)
            order = self.order(epoch)
            while position < len(order):
                indices = order[position : position + self.config.total_batch_size]
                yield indices.tolist(), self.micro_batches(indices)
                position += len(indices)
                consumed += len(indices)

    def order(self, epoch: int) -> np.ndarray:
        config, examples = self.config, self.examples
        order = epoch_order(examples.sizes, examples.weights, config.seed, epoch)
        if config.group_by_length:
            order = group_by_length(order, examples.lengths, config.total_batch_size, config.seed, epoch)
        return order

    def micro_batches(self, indices: np.ndarray) -> list[Batch]:
        """The examples of one step as this rank's micro-batches; every rank gets the same number of them."""
        return [self.batch(rows) for rows in self.layout(indices)]

    def layout(self, indices: np.ndarray) -> list[Rows]:
        """The examples of one step in the rows of this rank's micro-batches."""
        return self.plan(indices)[self.rank]

    def plan(self, indices: np.ndarray) -> list[list[Rows]]:
        """The examples of one step in the rows of each rank's micro-batches."""
        n_micro = self.config.gradient_accumulation_steps
        lengths, packing = self.examples.lengths[indices], self.config.packing
        plan = plan_step(lengths, self.world_size, n_micro, packing, self.row_capacity)
        return [[[[int(indices[i]) for i in row] for row in rows] for rows in mine] for mine in plan]

    def epoch_plan(self) -> Iterator[list[list[Rows]]]:
        """The plan of each step of the first epoch."""
        order, size = self.order(0), self.config.total_batch_size
        return (self.plan(order[start : start + size]) for start in range(0, len(order), size))

    def widths(self, batches: Iterable[Rows]) -> Iterator[list[int]]:
        """Tokens in each row of each of these batches, without making them."""
        own = self.examples.of_documents(lambda cache: np.diff(cache.offsets))  # [E, n]
        if self.shares_prompts:
            own = own - self.examples.of_documents(lambda cache: cache.shared)
        for rows in batches:
            if self.config.packing:
                yield [int(own[row].sum()) for row in rows]
            else:
                yield own[[example for row in rows for example in row]].reshape(-1).tolist()

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's share of the examples once, each rank as many batches, longest first."""
        return map(self.batch, self.eval_layout())

    def eval_layout(self) -> Iterator[Rows]:
        """The examples of an evaluation in the rows of this rank's batches."""
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
        """Rows of examples as rows of their documents; when these are not packed, each in a row of its own."""
        documents = [[document for i in row for document in self.examples[i]] for row in rows]
        if not self.config.packing:
            documents = [[document] for row in documents for document in row]
        if not self.shares_prompts:
            documents = [[dataclasses.replace(document, shared=0) for document in row] for row in documents]
        return collate(documents, self.pad_token_id)
