"""For every registered loss: the gradient does not depend on how the examples of a step are laid out.

Found by iterating over the registry, so that a new loss cannot escape it. The reference is each document alone in a
row, one backward pass for each example, the sums divided by the weight of all.
"""

import dataclasses

import numpy as np
import pytest
import torch

from minitrain.batch import IGNORE_INDEX, Batch, collate
from minitrain.data.examples import OF_TEXTS
from minitrain.data.sampler import plan_step
from minitrain.losses import create_loss, registered
from minitrain.model import attention
from minitrain.model.policy import Policy
from tests.conftest import random_llama
from tests.examples import LENGTHS, N, collated, examples, prepared, step
from tests.rows import REQUIRED

pytestmark = pytest.mark.numeric

# Options under which each loss is tried besides its defaults.
VARIANTS = {
    "sft": [{"label_smoothing": 0.1}, {"focal_gamma": 2.0}],
    "dft": [{"dft_alpha": 0.7}],
    "dpo": [
        {"variant": "orpo"},
        {"variant": "apo_down", "average_log_prob": True, "sft_weight": 0.2},
        {"variant": "aot_unpaired", "label_smoothing": 0.1},
        {"variant_weights": {"aot": 0.8, "bco_pair": 0.2}, "bco_shift": True, "ld_alpha": 0.3, "sft_weight": 1.0},
        {"f_divergence": "js", "wpo": True},
    ],
    "pairwise": [{"center_rewards_coefficient": 0.01}, {"loss_type": "hinge", "margin": 1.0}],
    "embed": [{"pooling": "mean", "temperature": 0.5}],
    "process": [{"positive_weight": 0.5}],
    "rerank": [{"temperature": 0.5}],
    "kto": [{"undesirable_weight": 0.5}, {"variant": "apo_zero_unpaired"}, {"variant": "bco", "desirable_weight": 2.0}],
    "policy": [
        {"loss_aggregation": "grpo", "importance_sampling_level": "sequence", "kl_coef": 0.1, "entropy_coef": 0.01},
        {"loss_aggregation": "dr_grpo", "advantage_estimator": "rloo", "dual_clip": 2.0},
        {"loss_aggregation": "grpo", "advantage_estimator": "rloo", "kl_coef": 0.1, "kl_times_ratio": True},
        {"loss_aggregation": "cispo", "advantage_estimator": "gae", "vf_coef": 0.1, "temperature": 0.7},
        {"loss_aggregation": "sapo", "scale_rewards": "batch"},
        {"loss_aggregation": "gmpo", "advantage_estimator": "reinforce++-baseline"},
        {"loss_aggregation": "luspo"},
        {  # softer than by default, where rollouts as far off-policy as these weigh 0
            "loss_aggregation": "vespo",
            "vespo_k_pos": 0.1,
            "vespo_lambda_pos": 0.01,
            "vespo_k_neg": 0.1,
            "vespo_lambda_neg": 0.01,
        },
    ],
    "classify": [
        {"regression": True},
        {"label_smoothing": 0.1, "class_weights": {"1": 3.0}},
        {"multi_label": True, "class_weights": {"1": 3.0}},
    ],
    "kd": [{"divergence": "jsd", "jsd_weight": 0.3}, {"divergence": "reverse_kl", "top_k": 5, "temperature": 1.0}],
}
CASES = [(name, options, False) for name in registered() for options in ({}, *VARIANTS.get(name, []))]
CASES += [(name, options, True) for name, options, _ in CASES if registered()[name].uses_target_weights]
ALL = [[i] for i in range(N)]
PACKED_ROWS = ([[0, 1, 2, 3, 4, 5, 6, 7]], [[4], [2, 7, 3], [0, 6, 5, 1]])


def assert_same(got, want, tolerance: float = 2e-5):
    assert got[0] == pytest.approx(want[0], rel=tolerance)
    assert len(got[1]) == len(want[1])
    for a, b in zip(got[1], want[1]):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}{'-weights' * case[2]}")
def case(request):
    name, options, weighted = request.param
    loss = create_loss(name, **REQUIRED.get(name, {}) | options)
    made = prepared(loss, weighted)
    return loss, made, step(loss, [collated(made, [[i]]) for i in range(N)])


def test_split_into_micro_batches(case):
    """8x1, 1x8, 4x2 and uneven micro-batches: one gradient (transformers#34191, torchtune#1875, silent RL bug R9)."""
    loss, made, want = case
    assert any(gradient.any() for gradient in want[1])
    for parts in ([[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]], [[5], [0, 1, 2, 3, 4, 6], [7]]):
        assert_same(step(loss, [collated(made, [[i] for i in part]) for part in parts]), want)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("packing", [False, True])
def test_split_over_ranks(case, world_size, packing):
    """The sum of all ranks' gradients, as the sampler cuts a step, is that of one rank (torchtitan#1842)."""
    loss, made, want = case
    plan = plan_step(np.array(LENGTHS), world_size, 2, packing)
    assert len({len(share) for share in plan}) == 1
    batches = [collated(made, rows, packing) for share in plan for rows in share]
    assert_same(step(loss, batches, attention.NAME if packing else "sdpa"), want)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
def test_packing(case, implementation):
    """Several documents in a row give what they give alone (transformers#31629)."""
    loss, made, want = case
    for rows in PACKED_ROWS:
        assert_same(step(loss, [collated(made, rows, packed=True)], implementation), want)


def test_shared_prompts(case):
    """What documents of an example have in common is computed once, and the numbers are those of separate rows."""
    loss, made, want = case
    for rows in PACKED_ROWS:
        batch = collated(made, rows, packed=True, shared=True)
        assert (batch.prefixes is not None) == any(document.shared for document in made[0])
        assert_same(step(loss, [batch], attention.NAME), want)


def padded(batch: Batch, left: int, right: int, garbage: bool) -> Batch:
    """The same batch with more padding on either side, and anything at all in the places that are no text."""
    rows = batch.input_ids.shape[0]

    def widen(tensor, value):
        def block(width):
            return torch.full((rows, width, *tensor.shape[2:]), value, dtype=tensor.dtype)

        return torch.cat([block(left), tensor, block(right)], 1)

    ids, labels = widen(batch.input_ids, 0), widen(batch.labels, IGNORE_INDEX)
    doc_ids, positions = widen(batch.doc_ids, -1), widen(batch.position_ids, 0)
    positions[:, :left] = torch.arange(left)
    last = batch.position_ids[:, -1:]
    positions[:, positions.shape[1] - right :] = last + 1 + torch.arange(right)
    columns = {name: widen(column, float("nan") if garbage else 0) for name, column in batch.token_features.items()}
    if garbage:
        ids[doc_ids < 0] = torch.randint(259, (int((doc_ids < 0).sum()),))
    return Batch(ids, positions, labels, doc_ids, batch.n_docs, doc_features=batch.doc_features, token_features=columns)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
@pytest.mark.parametrize(("left", "right"), [(0, 9), (6, 0), (4, 5)])
def test_padding_amount_side_and_content(case, left, right, implementation):
    """More padding, on the left or right, full of garbage: the same (pytorch#73205, AReaL#1346, silent RL bug R8)."""
    loss, made, want = case
    for rows, packed in ((ALL, False), (PACKED_ROWS[1], True)):
        batch = padded(collated(made, rows, packed), left, right, garbage=True)
        assert_same(step(loss, [batch], implementation), want)


def test_nothing_to_learn_changes_nothing(case):
    """A micro-batch of no documents, or of documents without a label, adds a zero that is attached to the graph."""
    loss, made, want = case
    empty, rest = collate([], pad_token_id=0), [collated(made, ALL)]
    assert loss.num_items(empty) == 0
    assert_same(step(loss, [empty, *rest]), want)
    if loss.example_type in OF_TEXTS:  # which are learned from without a word of them being a target
        return
    masked = collated(made, [[0], [1]])
    masked = dataclasses.replace(masked, labels=torch.full_like(masked.labels, IGNORE_INDEX))
    assert loss.num_items(masked) == 0
    assert_same(step(loss, [empty, *rest, masked]), want)


def test_attention_of_one_document_never_reaches_another():
    """The gradient of B's loss with respect to A's embeddings is exactly zero, not just small."""
    made = examples("conversation")
    for implementation in ("sdpa", "eager", attention.NAME):
        model = random_llama()
        attention.register()
        model.set_attn_implementation(implementation)
        seen = []
        model.get_input_embeddings().register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
        scores = Policy(model)(collated(made, [[0, 4]], packed=True))
        seen[0].retain_grad()
        scores.per_document(scores.logps)[1].backward()
        assert not seen[0].grad[0, : LENGTHS[0]].any()
        assert seen[0].grad[0, LENGTHS[0] :].any()
