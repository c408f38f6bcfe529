"""Order the examples of an epoch, and lay those of an optimizer step out in batch rows, on ranks and micro-batches.

All functions are pure. The order depends on (seed, epoch) only. The layout of an optimizer step does not change the
gradient, so it may depend on anything.
"""

import heapq
import itertools
import math
from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

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


def plan_within(
    sizes: "Sizes", world_size: int, max_tokens: int, packing: bool, row_capacity: int | None = None
) -> list[list[BatchRows]]:
    """Return what `plan_step` does, with as few micro-batches as needed for `max_tokens` in each of them.

    All ranks get the same number of micro-batches. An example with more tokens has a micro-batch of its own.

    Args:
        sizes: The sizes of the examples.
        max_tokens: Tokens of a micro-batch on a rank, at most, padding included.
    """
    lengths = sizes.lengths
    if packing and row_capacity is None:
        bins = best_fit(lengths, max_tokens)
        n_bins = world_size * math.ceil(len(bins) / world_size)
        even = balance_by_tokens(lengths, n_bins)
        if all(len(each) == 1 or lengths[each].sum() <= max_tokens for each in even):
            bins = even
        bins = sorted(bins, key=lambda each: -lengths[each].sum()) + [[]] * (n_bins - len(bins))
        starts = range(0, n_bins, world_size)
        return [[[row] if (row := bins[start + rank]) else [] for start in starts] for rank in range(world_size)]
    rows = [[i] for i in range(len(lengths))]
    if packing:
        rows = best_fit(lengths, min(row_capacity, max_tokens))
        packed = np.array([lengths[row].sum() for row in rows])
        sizes = Sizes(packed, np.ones_like(packed), packed)
    order = np.argsort(-sizes.longest, kind="stable")
    parts = [
        [rows[i] for i in order[part]]
        for part in split_within(sizes.at(order), world_size, max_tokens, is_packed=False)
    ]
    return [[part[rank::world_size] for part in parts] for rank in range(world_size)]


class Sizes(NamedTuple):
    """Sizes of examples.

    Attributes:
        lengths: Tokens of each example, shape [n].
        n_documents: Documents of each example, shape [n].
        longest: Tokens of the longest document of each example, shape [n].
    """

    lengths: np.ndarray
    n_documents: np.ndarray
    longest: np.ndarray

    def at(self, indices: np.ndarray) -> "Sizes":
        return Sizes(*(numbers[indices] for numbers in self))


def split_within(
    sizes: Sizes, world_size: int, max_tokens: int, is_packed: bool, max_examples: int | None = None
) -> list[slice]:
    """Split examples, the longest first, into parts that are dealt to the ranks in turn.

    Args:
        sizes: The sizes of the examples.
        max_tokens: Tokens of a rank in each part, at most: the sum of the lengths if it is packed, else with padding.
        max_examples: Examples of a rank in each part, at most.
    """
    parts, start = [], 0
    n_rows = n_tokens = width = 0
    for i in range(0, len(sizes.lengths), world_size):
        group = slice(i, i + world_size)
        n_rows += sizes.n_documents[group].max()
        n_tokens += sizes.lengths[group].max()
        width = max(width, sizes.longest[group].max())
        is_full = max_examples is not None and i - start == max_examples * world_size
        if i > start and (is_full or (n_tokens if is_packed else n_rows * width) > max_tokens):
            parts.append(slice(start, i))
            start = i
            n_rows, n_tokens = sizes.n_documents[group].max(), sizes.lengths[group].max()
            width = sizes.longest[group].max()
    return [*parts, slice(start, len(sizes.lengths))]


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
