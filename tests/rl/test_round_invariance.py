"""For every loss that trains online: the gradient of a sampled round does not depend on its layout.

The reference is each document alone in a row, one backward pass for each prompt, as in tests/losses/test_invariance.py.
"""

import numpy as np
import pytest
import torch

from minitrain.data.sampler import plan_step
from minitrain.losses import registered
from minitrain.model import attention
from tests.examples import collated, step
from tests.losses.test_invariance import padded
from tests.rl.test_rounds import LOSSES, online  # noqa: F401 (a fixture)

pytestmark = pytest.mark.numeric

POLICIES = {
    "grpo-kl": {"loss_aggregation": "grpo", "kl_coef": 0.1, "kl_times_ratio": True, "entropy_coef": 0.01},
    "dr_grpo": {"loss_aggregation": "dr_grpo", "scale_rewards": "none"},
    "rloo": {"loss_aggregation": "grpo", "advantage_estimator": "rloo", "importance_sampling_level": "product"},
    "reinforce++": {"advantage_estimator": "reinforce++", "kl_coef": 0.05},
    "reinforce++-baseline": {"advantage_estimator": "reinforce++-baseline", "loss_aggregation": "cispo"},
    "gspo": {"loss_aggregation": "grpo", "importance_sampling_level": "sequence", "scale_rewards": "batch"},
    "sapo": {"loss_aggregation": "sapo"},
    "gmpo": {"loss_aggregation": "gmpo"},
    "luspo": {"loss_aggregation": "luspo"},
    "vespo": {"loss_aggregation": "vespo"},
}
CASES = LOSSES | {name: {"name": "policy"} | options for name, options in POLICIES.items()}


def test_every_loss_that_trains_online_has_a_case():
    """All of minitrain's but those whose models return scores or embeddings."""
    ours = {name for name, loss in registered().items() if loss.__module__.startswith("minitrain.")}
    without_text = {"classify", "embed", "pairwise", "process", "rerank", "value"}
    assert ours - without_text == {case["name"] for case in CASES.values()}


@pytest.fixture
def sampled(online, request):  # noqa: F811
    """The loss, the models and the examples of a round, after which the policy has moved."""
    options = CASES[request.param]
    rollout = {"prompts_per_round": 6, "num_generations": 3, "num_iterations": 2}
    if options["name"] == "policy":
        rollout |= {"importance_correction": "tis", "truncated": "mask", "max_new_tokens": 20}
    trainer = online(loss=options, rollout=rollout, total_batch_size=6)
    trainer.template.end_ids = lambda: list(range(3, 30))  # so that some responses end
    next(trainer.train_loader.steps())
    round_data = trainer.train_loader.examples
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return trainer.loss, trainer.models, [round_data[i] for i in range(len(round_data))]


@pytest.mark.parametrize("sampled", CASES, indirect=True)
def test_the_gradient_of_a_round_does_not_depend_on_its_layout(sampled):
    """Micro-batches, order, packing, shared prompts, padding with garbage, ranks (silent RL bugs R8, R9 and R13)."""
    loss, models, made = sampled
    n = len(made)
    rows, backward = [[i] for i in range(n)], [[i] for i in reversed(range(n))]
    assert n > 2

    def gradients(batches, implementation=attention.NAME):
        models.policy.model.set_attn_implementation(implementation)
        return step(loss, batches, models=models)

    value, wanted = gradients([collated(made, [row]) for row in rows], "sdpa")
    assert any(gradient.any() for gradient in wanted)
    wanted = [gradient.clone() for gradient in wanted]
    packed = [[*range(0, n, 2)], [*range(1, n, 2)]]
    shares = plan_step(np.array([sum(len(d.ids) for d in example) for example in made]), 2, 2, True)
    layouts = {
        "one micro-batch": [collated(made, rows)],
        "uneven micro-batches, backward": [collated(made, backward[:1]), collated(made, backward[1:])],
        "packed": [collated(made, packed, packed=True)],
        "packed, backward": [collated(made, [row[::-1]], packed=True) for row in packed[::-1]],
        "shared prompts": [collated(made, packed, packed=True, shared=True)],
        "padding": [padded(collated(made, rows), 3, 4, garbage=True)],
        "ranks": [collated(made, part, packed=True) for share in shares for part in share],
    }
    for name, batches in layouts.items():
        found = gradients(batches)
        assert found[0] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        for a, b in zip(found[1], wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item(), msg=name)
