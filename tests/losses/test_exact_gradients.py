"""The expectation of the policy loss's gradient over all responses of a policy of three tokens, in float64."""

import itertools
import math

import pytest
import torch

from minitrain import ConfigError, create_loss
from minitrain.batch import Document, collate
from minitrain.losses import Models, add_features
from tests.examples import files
from tests.losses.test_rollouts import Table
from tests.messages import raises

END = 0
RESPONSES = [(END,), *itertools.product((1, 2), (END, 1, 2))]  # all of at most two tokens
REWARDS = [0.5, -1.0, 2.0, 0.25, 1.0, 0.0, -0.75]  # of each; sums and means of two are exact
BETA = 0.3


class Tiny:
    """A policy of three tokens whose logits after the prompt, after 1 and after 2 are parameters."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def logps(self, response: tuple[int, ...]) -> torch.Tensor:
        """Return the log-probability of each token of a response."""
        table = self.logits.log_softmax(-1)
        return torch.stack([table[row, token] for row, token in zip((0, *response), response)])

    def expectation(self, values: list) -> torch.Tensor:
        return sum(self.logps(r).sum().exp() * value for r, value in zip(RESPONSES, values, strict=True))


@pytest.fixture
def policy():
    return Tiny(0)


@pytest.fixture
def reference():
    return Tiny(1)


def gradient(value: torch.Tensor, policy: Tiny) -> torch.Tensor:
    return torch.autograd.grad(value, policy.logits)[0]


def expected_gradient(policy: Tiny, reference: Tiny, size: int, rewards: list[float], **options) -> torch.Tensor:
    """The gradient of the loss of a group of `size` responses to a prompt, over all such groups by their probability.

    The loss of a group is its sum divided by the number of responses, not of tokens, which would be biased.
    """
    loss = create_loss("policy", whiten=False, **options)
    groups = list(itertools.product(range(len(RESPONSES)), repeat=size))
    made, logps = [], []
    for number, group in enumerate(groups):
        for i in group:
            ids, mask = torch.tensor([5, *(6 + token for token in RESPONSES[i])]), torch.ones(1 + len(RESPONSES[i]))
            mask[0] = 0
            document = Document(ids, mask.to(torch.uint8))
            document.doc_features = {"reward": rewards[i], "group": float(number)}
            logps.append(policy.logps(RESPONSES[i]))
            columns = {"old_logps": logps[-1].detach(), "ref_logps": reference.logps(RESPONSES[i]).detach()}
            document.token_features = {name: torch.cat([torch.zeros(1), x]) for name, x in columns.items()}
            made.append([document])
    (file,) = files(made)
    add_features(loss, [file])
    for number, (document,) in enumerate(made):
        span = slice(file.offsets[number], file.offsets[number + 1])
        document.token_features = {name: column[span] for name, column in file.token_features.items()}
    batch, sampled = collate(made, 0), torch.cat(logps)
    output = loss(batch, Models(Table(sampled, torch.zeros_like(sampled))))
    (slopes,) = torch.autograd.grad(output.loss_sum, sampled, retain_graph=True)
    units = len(made) if loss.options.loss_aggregation == "dr_grpo" else output.num_items.item()
    weights = torch.stack([one.sum().exp() for one in logps]).detach().view(-1, size).prod(1)  # of each group
    weights = weights.repeat_interleave(size)[batch.target_docs] * len(groups) / units
    return gradient((weights * slopes * sampled).sum(), policy)


SUMS = {"loss_aggregation": "dr_grpo", "max_new_tokens": 1}
PRODUCT = {"loss_aggregation": "grpo", "importance_sampling_level": "product"}
CASES = {
    "reinforce++": ({"advantage_estimator": "reinforce++", **SUMS}, 1, 1),
    "rloo": ({"advantage_estimator": "rloo", **SUMS}, 2, 1),
    "rloo, product": ({"advantage_estimator": "rloo", **PRODUCT}, 2, 1),
    "grpo": (
        {"scale_rewards": "none", **SUMS},
        2,
        1 / 2,
    ),  # (n - 1) / n, because the mean has the response's own reward
    "reinforce++-baseline": ({"advantage_estimator": "reinforce++-baseline", **SUMS}, 2, 1 / 2),
    "luspo": ({"advantage_estimator": "rloo", "loss_aggregation": "luspo"}, 2, 1),
}


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_the_responses_are_all():
    assert Tiny(0).expectation([1.0] * len(RESPONSES)).item() == pytest.approx(1)
    assert Tiny(0).logits.log_softmax(-1).exp().sum().item() == pytest.approx(3)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_expected_reward(policy, reference, name):
    options, size, factor = CASES[name]
    found = expected_gradient(policy, reference, size, REWARDS, **options)
    close(found, -factor * gradient(policy.expectation(REWARDS), policy))


@pytest.mark.parametrize(("kind", "size"), [("reinforce++", 1), ("rloo", 2)])
def test_a_kl_in_the_rewards_is_that_to_the_reference(policy, reference, kind, size):
    """k1 in the rewards: the gradient is that of E[R] - beta KL(policy || reference) of full responses. Nothing of it
    is in the loss as well (silent RL bugs R23 and R26)."""
    options = {"advantage_estimator": kind, "kl_coef": BETA, "kl_in": "reward", **SUMS}
    found = expected_gradient(policy, reference, size, REWARDS, **options)
    kl = [(policy.logps(r) - reference.logps(r)).sum() for r in RESPONSES]
    close(found, gradient(BETA * policy.expectation(kl) - policy.expectation(REWARDS), policy))


@pytest.mark.parametrize("options", [{"kl_estimator": "k2"}, {"kl_times_ratio": True}], ids=["k2", "k3 times ratio"])
def test_a_kl_in_the_loss_is_that_of_each_token(policy, reference, options):
    """The gradient is that of the KL at each token that was reached, and that of E[R] (silent RL bugs R23, R25, R26).
    k3 without the ratio has the gradient of KL(reference || policy), and k1 none: it is refused."""
    options = {"advantage_estimator": "rloo", "kl_coef": BETA, "kl_in": "loss", **SUMS, **options}
    found = expected_gradient(policy, reference, 2, REWARDS, **options)
    p, q = policy.logits.log_softmax(-1), reference.logits.log_softmax(-1).detach()
    reached = torch.cat([torch.ones(1), p[0, 1:].detach().exp()])  # the prompt, and each first token that is no end
    kl = (reached * (p.exp() * (p - q)).sum(-1)).sum()
    close(found, gradient(BETA * kl - policy.expectation(REWARDS), policy))
    with raises(ConfigError, "conflict", "loss.kl_estimator: "):
        create_loss("policy", kl_coef=BETA, kl_estimator="k1")


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_a_kl_times_the_product_ratio_is_that_of_full_responses(policy, reference, estimator):
    """The ratio of a full response also counts what a token does to later ones. One response to each prompt is
    enough."""
    given = {"advantage_estimator": "reinforce++", "kl_coef": BETA, "kl_in": "loss", "kl_estimator": estimator}
    sums = {"importance_sampling_level": "product", **SUMS}
    found = expected_gradient(policy, reference, 1, [0.0] * len(RESPONSES), kl_times_ratio=True, **given, **sums)
    kl = [(policy.logps(r) - reference.logps(r)).sum() for r in RESPONSES]
    # Each of a response's tokens has the ratio of the response: k1 and k3 of all of them add up.
    close(found, gradient(BETA * policy.expectation(kl), policy))


def test_scaled_and_clipped_surrogates_point_uphill(policy, reference):
    """Of the estimators that are biased (divided by tokens, a deviation or a length), all raise the expected reward."""
    uphill = gradient(policy.expectation(REWARDS), policy)
    for options in (
        {"scale_rewards": "group"},
        {"scale_rewards": "batch"},
        {"loss_aggregation": "grpo"},
        {"loss_aggregation": "sapo"},
        {"loss_aggregation": "gmpo"},
        {"loss_aggregation": "vespo"},
        {"loss_aggregation": "cispo"},
    ):
        found = -expected_gradient(policy, reference, 2, REWARDS, **options)
        cosine = (found * uphill).sum() / (found.norm() * uphill.norm())
        assert cosine.item() > 0.8 and math.isfinite(cosine), options


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_step_along_the_gradient_lowers_the_kl(policy, reference, place):
    """And a policy further from the reference has a larger loss (silent RL bug R23)."""

    def kl(logits: torch.Tensor) -> float:
        p, q = logits.log_softmax(-1), reference.logits.log_softmax(-1)
        reached = torch.cat([torch.ones(1), p[0, 1:].exp()])
        return (reached * (p.exp() * (p - q)).sum(-1)).sum().item()

    options = {"advantage_estimator": "reinforce++", "kl_coef": BETA, "kl_in": place, **SUMS}
    before = kl(policy.logits)
    found = expected_gradient(policy, reference, 1, [0.0] * len(RESPONSES), **options)
    assert kl(policy.logits - 0.1 * found) < before < kl(policy.logits + 0.1 * found)
