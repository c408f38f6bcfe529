"""The order of examples, their packing into rows, and the share of each rank: pure functions.

The order is a function of (seed, epoch) alone and the position in it one integer, the number of examples
consumed over all ranks. How the examples of one optimizer step are laid out (sorted, packed, split over ranks and
micro-batches) does not change the gradient, so it may depend on anything.
"""

import heapq
import itertools
import math
from bisect import bisect_left, insort

import numpy as np

WINDOW_STEPS = 64  # group_by_length sorts inside a window of so many steps

Rows = list[list[int]]  # the documents of each row of a micro-batch


def epoch_size(sizes: list[int], weights: list[float]) -> int:
    """Examples in an epoch over data sets of these sizes, each seen `weight` times."""
    return sum(_share(size, weight) for size, weight in zip(sizes, weights, strict=True))


def epoch_order(sizes: list[int], weights: list[float], seed: int, epoch: int) -> np.ndarray:
    """Indices into the concatenated data sets in the order of one epoch -> [epoch_size] int64.

    A weight of 2.5 takes every example twice and half of them, another half each epoch, a third time.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    parts, start = [], 0
    for size, weight in zip(sizes, weights, strict=True):
        whole, rest = divmod(_share(size, weight), size)
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


def _share(size: int, weight: float) -> int:
    return max(1, round(size * weight))
