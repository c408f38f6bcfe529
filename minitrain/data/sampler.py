"""The order of examples, their packing into rows, and the share of each rank: pure functions.

The order is a function of (seed, epoch) alone and the position in it one integer, the number of examples
consumed over all ranks. How the examples of one optimizer step are laid out (sorted, packed, split over ranks and
micro-batches) does not change the gradient, so it may depend on anything.
"""

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


def plan_step(lengths: np.ndarray, world_size: int, n_micro: int, packing: bool) -> list[list[Rows]]:
    """Lays the examples 0..n-1 of one optimizer step out -> [rank][micro-batch][row][document].

    Every rank gets the same number of micro-batches, fewer than `n_micro` where there are not as many rows; at the
    short end of an epoch a rank's may be empty. Examples of like length come together, which saves padding and
    changes no gradient, and ranks take turns in each micro-batch, so that they have like amounts of work.
    """
    descending = np.argsort(-lengths, kind="stable").tolist()
    rows = best_fit(lengths, int(lengths.max())) if packing else [[index] for index in descending]
    n_micro = min(n_micro, math.ceil(len(rows) / world_size))
    cuts = [round(i * len(rows) / n_micro) for i in range(n_micro + 1)]
    parts = [rows[a:b] for a, b in itertools.pairwise(cuts)]
    return [[part[rank::world_size] for part in parts] for rank in range(world_size)]


def best_fit(lengths: np.ndarray, capacity: int) -> Rows:
    """Best-fit decreasing: each document goes into the fullest row that still has room for it.

    The capacity is the longest document's length: rows are then as long as they have to be and no longer, since
    attention costs the square of it.
    """
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
