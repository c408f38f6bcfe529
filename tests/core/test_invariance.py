"""For every registered loss: the gradient does not depend on how the examples of a step are laid out.

Found by iterating over the registry, so that a new loss cannot escape it. The reference is each document alone in a
row, one backward pass each, the sums divided by the weight of all.
"""

import numpy as np
import pytest
import torch

from minitrain.batch import IGNORE, Batch
from minitrain.data.collate import collate
from minitrain.data.sampler import plan_step
from minitrain.losses import create_loss, registered
from minitrain.model import attention
from minitrain.model.policy import Policy
from tests.conftest import random_llama

# Options under which each loss is tried besides its defaults.
VARIANTS = {"sft": [{"label_smoothing": 0.1}, {"focal_gamma": 2.0}], "dft": [{"dft_alpha": 0.7}]}
CASES = [(name, options) for name in registered() for options in ({}, *VARIANTS.get(name, []))]
LENGTHS = (9, 3, 14, 5, 30, 2, 7, 11)  # of which 1 to 27 tokens are learned


def documents():
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 259, (length,), generator=generator, dtype=torch.int32)
        mask = torch.ones(length, dtype=torch.uint8)
        mask[: max(1, length // 4)] = 0
        made.append((ids, mask))
    return made


def collated(rows: list[list[int]]) -> Batch:
    docs = documents()
    return collate([[docs[i] for i in row] for row in rows], pad_token_id=0)


def step(loss, batches: list[Batch], implementation: str = "sdpa"):
    """(loss value, gradients) of one optimizer step over micro-batches, as the trainer does it."""
    model = random_llama(hidden_size=32)
    model.set_attn_implementation(implementation)
    policy = Policy(model)
    weight = sum(loss.weight(batch) for batch in batches)
    value = 0.0
    for batch in batches:
        output = loss(batch, policy)
        (output.sum / weight).backward()
        value += output.sum.item() / weight.item()
    return value, [p.grad for p in policy.parameters()]


def assert_same(got, want, tolerance: float = 2e-5):
    assert got[0] == pytest.approx(want[0], rel=tolerance)
    for a, b in zip(got[1], want[1]):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    name, options = request.param
    loss = create_loss(name, **options)
    return loss, step(loss, [collated([[i]]) for i in range(len(LENGTHS))])


def test_split_into_micro_batches(case):
    """8x1, 1x8, 4x2 and uneven micro-batches: one gradient (transformers#34191, torchtune#1875)."""
    loss, want = case
    for parts in ([[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]], [[5], [0, 1, 2, 3, 4, 6], [7]]):
        assert_same(step(loss, [collated([[i] for i in part]) for part in parts]), want)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("packing", [False, True])
def test_split_over_ranks(case, world_size, packing):
    """The sum of all ranks' gradients, as the sampler cuts a step, is that of one rank (torchtitan#1842)."""
    loss, want = case
    plan = plan_step(np.array(LENGTHS), world_size, 2, packing)
    assert len({len(share) for share in plan}) == 1
    batches = [collated(rows) for share in plan for rows in share]
    assert_same(step(loss, batches, attention.NAME if packing else "sdpa"), want)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
def test_packing(case, implementation):
    """Several documents in a row give what they give alone (transformers#31629)."""
    loss, want = case
    for rows in ([[0, 1, 2, 3, 4, 5, 6, 7]], [[4], [2, 7, 3], [0, 6, 5, 1]]):
        assert_same(step(loss, [collated(rows)], implementation), want)


def padded(batch: Batch, left: int, right: int, garbage: bool) -> Batch:
    """The same batch with more padding on either side, and anything at all in the places that are no text."""
    rows = batch.input_ids.shape[0]

    def widen(tensor, value):
        return torch.cat([torch.full((rows, left), value), tensor, torch.full((rows, right), value)], 1)

    ids, labels = widen(batch.input_ids, 0), widen(batch.labels, IGNORE)
    doc_ids, positions = widen(batch.doc_ids, -1), widen(batch.position_ids, 0)
    positions[:, :left] = torch.arange(left)
    last = batch.position_ids[:, -1:]
    positions[:, positions.shape[1] - right :] = last + 1 + torch.arange(right)
    if garbage:
        ids[doc_ids < 0] = torch.randint(259, (int((doc_ids < 0).sum()),))
    return Batch(ids, positions, labels, doc_ids, batch.n_docs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
@pytest.mark.parametrize(("left", "right"), [(0, 9), (6, 0), (4, 5)])
def test_padding_amount_side_and_content(case, left, right, implementation):
    """More padding, on the left or right, full of garbage: the same (pytorch#73205, transformers#38... positions)."""
    loss, want = case
    for rows in ([[i] for i in range(8)], [[4], [2, 7, 3], [0, 6, 5, 1]]):
        assert_same(step(loss, [padded(collated(rows), left, right, garbage=True)], implementation), want)


def test_a_fully_masked_micro_batch_changes_nothing(case):
    """A micro-batch without a label adds a zero that is attached to the graph, and no NaN."""
    loss, want = case
    empty = collate([], pad_token_id=0)
    masked = collated([[0], [1]])
    masked = Batch(masked.input_ids, masked.position_ids, masked.labels.fill_(IGNORE), masked.doc_ids, 2)
    assert loss.weight(empty) == 0 and loss.weight(masked) == 0
    rest = [collated([[i] for i in range(8)])]
    assert_same(step(loss, [empty, *rest, masked]), want)


def test_attention_of_one_document_never_reaches_another():
    """The gradient of B's loss with respect to A's embeddings is exactly zero, not just small."""
    for implementation in ("sdpa", "eager", attention.NAME):
        model = random_llama()
        model.set_attn_implementation(implementation)
        seen = []
        model.get_input_embeddings().register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
        scores = Policy(model)(collated([[0, 4]]))
        seen[0].retain_grad()
        scores.per_document(scores.logps)[1].backward()
        assert not seen[0].grad[0, : LENGTHS[0]].any()
        assert seen[0].grad[0, LENGTHS[0] :].any()
