"""The order of data and its layout: pure functions, checked by what must stay the same."""

from collections import Counter

import numpy as np
import pytest

from minitrain.data.sampler import Sizes, best_fit, epoch_order, epoch_size, group_by_length, plan_step, plan_within


def lengths_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 200, n)


def test_order_is_a_pure_function():
    """The same (seed, epoch) gives the same order, another one another, whatever was drawn before."""
    first = epoch_order([50, 30], [1, 1], 3, 2)
    np.random.seed(1)
    assert (epoch_order([50, 30], [1, 1], 3, 2) == first).all()
    assert (epoch_order([50, 30], [1, 1], 3, 1) != first).any()
    assert (epoch_order([50, 30], [1, 1], 2, 2) != first).any()


def test_epochs_differ_and_each_is_complete():
    """Each epoch has another order and every example once (pytorch#31771)."""
    orders = [epoch_order([50, 30], [1, 1], 0, epoch) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(80)) for order in orders)


def test_order_does_not_change_between_versions():
    """The order is that of PCG64 and stays so: a run may be resumed years later."""
    assert epoch_order([6, 4], [1, 1], 0, 0).tolist() == [2, 8, 3, 6, 0, 4, 7, 5, 1, 9]


@pytest.mark.parametrize("weight", [0.5, 1, 2, 2.5])
def test_weights(weight):
    """A weight is how often an epoch sees each example; a broken part of it is drawn anew each epoch."""
    sizes, seen = [20, 40], Counter()
    for epoch in range(2):
        order = epoch_order(sizes, [1, weight], 0, epoch)
        counts = np.bincount(order, minlength=60)
        assert len(order) == epoch_size(sizes, [1, weight]) == 20 + 40 * weight
        assert (counts[:20] == 1).all()
        assert set(counts[20:]) <= {int(weight), int(weight) + 1} and counts[20:].sum() == 40 * weight
        seen[epoch] = tuple(counts[20:])
    assert (seen[0] == seen[1]) == (weight == int(weight))


def test_a_small_weight_keeps_one_example():
    """No data set vanishes by rounding."""
    assert epoch_size([3, 10], [0.01, 1]) == 11
    assert (epoch_order([3, 10], [0.01, 1], 0, 0) < 3).sum() == 1


@pytest.mark.parametrize("n", [1, 7, 8, 1000])
def test_group_by_length(n):
    """A permutation with less padding; batches come in random order, and a short one only at the end."""
    lengths = lengths_of(n)
    order = epoch_order([n], [1], 0, 0)
    grouped = group_by_length(order, lengths, 8, 0, 0)
    assert sorted(grouped) == sorted(order)

    def padding(order):
        batches = [lengths[order[i : i + 8]] for i in range(0, n, 8)]
        return sum(len(batch) * batch.max() - batch.sum() for batch in batches)

    assert padding(grouped) <= padding(order)
    if n == 1000:
        assert padding(grouped) < 0.2 * padding(order)
        longest = [lengths[grouped[i : i + 8]].max() for i in range(0, n, 8)]
        assert 0.35 < np.mean(np.diff(longest) > 0) < 0.65  # neither ascending nor descending
        assert (grouped != group_by_length(order, lengths, 8, 0, 1)).any()


@pytest.mark.parametrize("seed", range(5))
def test_best_fit(seed):
    """Every document stands in one row, no row overflows, and there are hardly more rows than there must be."""
    lengths = lengths_of(300, seed)
    rows = best_fit(lengths, 256)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert max(lengths[row].sum() for row in rows) <= 256
    assert len(rows) <= 1.1 * lengths.sum() / 256 + 1


def test_best_fit_fills_exactly():
    """A document that fits to the token takes the place."""
    assert sorted(map(sorted, best_fit(np.array([6, 4, 7, 3, 10]), 10))) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("packing", "capacity"), [(False, None), (True, None), (True, 1), (True, 300)])
@pytest.mark.parametrize("n_micro", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_plan_step(world_size, n_micro, packing, capacity):
    """Every example of a step once over all ranks, the same number of micro-batches on each: also where the last
    step of an epoch is short (transformers#39659)."""
    for n in [1, 2, 3, 5, 7, 11, 12, 16, 33]:
        lengths = lengths_of(n, n)
        plan = plan_step(lengths, world_size, n_micro, packing, capacity)
        assert len(plan) == world_size
        assert len({len(share) for share in plan}) == 1 and 1 <= len(plan[0]) <= n_micro
        documents = [i for share in plan for rows in share for row in rows for i in row]
        assert sorted(documents) == list(range(n))
        rows = [row for share in plan for rows in share for row in rows]
        assert packing or all(len(row) == 1 for row in rows)
        if capacity:
            assert all(lengths[row].sum() <= max(capacity, lengths.max()) for row in rows)
        elif packing:
            assert all(len(rows) <= 1 for share in plan for rows in share)


@pytest.mark.parametrize("packing", [False, True])
def test_ranks_are_even(packing):
    """Ranks get like amounts of work, so that none waits for another."""
    lengths = lengths_of(64)
    plan = plan_step(lengths, 2, 2, packing)
    work = [sum(len(rows) * max(lengths[row].sum() for row in rows) for rows in share) for share in plan]
    assert max(work) < 1.05 * min(work)


@pytest.mark.parametrize("kind", ["packed", "packed rows", "padded", "pairs"])
@pytest.mark.parametrize(("world_size", "max_tokens"), [(1, 400), (1, 100), (3, 400), (4, 10_000)])
def test_a_budget_of_tokens(kind, world_size, max_tokens):
    """Each micro-batch fits, or is one example; ranks have the same number; nothing is lost; few are needed."""
    for seed in range(5):
        n, rng = 60, np.random.default_rng(seed)
        first = lengths_of(n, seed)
        second = rng.integers(2, 200, n) if kind == "pairs" else np.zeros(n, np.int64)
        sizes = Sizes(first + second, 1 + (second > 0), np.maximum(first, second))
        capacity = 250 if kind == "packed rows" else None
        plan = plan_within(sizes, world_size, max_tokens, kind.startswith("packed"), capacity)
        assert sorted(i for rank in plan for micro in rank for row in micro for i in row) == list(range(n))
        assert len({len(rank) for rank in plan}) == 1
        for micro in (micro for rank in plan for micro in rank if micro):
            examples = [i for row in micro for i in row]
            if kind in ("padded", "pairs"):
                size = sizes.n_documents[examples].sum() * sizes.longest[examples].max()
            else:
                size = len(micro) * max(sizes.lengths[row].sum() for row in micro)
            assert size <= max_tokens or len(examples) == 1
        least = sizes.lengths.sum() / world_size / max_tokens
        if kind == "packed" and max_tokens == 400:
            assert len(plan[0]) <= 1.1 * least + 1
        if max_tokens == 10_000:
            assert len(plan[0]) == 1 if kind != "pairs" else len(plan[0]) <= 2


def test_rows_of_a_step_within_a_budget_are_even():
    """The ranks have about the same number of tokens."""
    sizes = Sizes(*[lengths_of(64)] * 3)
    plan = plan_within(sizes, 2, 1000, packing=True)
    for one, other in zip(*plan, strict=True):
        tokens = [sum(sizes.lengths[i] for row in micro for i in row) for micro in (one, other)]
        assert abs(tokens[0] - tokens[1]) < 100
