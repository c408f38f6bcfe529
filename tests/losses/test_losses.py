"""Each loss against hand algebra and against PyTorch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minitrain import ConfigError, Models, create_loss, load_config
from minitrain.batch import PolicyOutput
from minitrain.model.logprobs import LMHead, chunked_logprobs
from tests.messages import raises
from tests.rows import REQUIRED

pytestmark = pytest.mark.numeric


class TablePolicy:
    """A policy whose logits are a given [N, V] table: hidden states times the identity."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits.requires_grad_()

    def __call__(self, batch, detached_weight_fn=None, entropy=False, mean_logps=False) -> PolicyOutput:
        layer = LMHead(torch.eye(self.logits.shape[1]))
        scores = chunked_logprobs(self.logits, batch.targets, layer, detached_weight_fn, entropy, mean_logps)
        return PolicyOutput(scores.logps, torch.zeros_like(batch.targets), 1, scores.entropy, scores.mean_logps)


class Targets:
    def __init__(self, targets: torch.Tensor, weights: torch.Tensor | None = None):
        self.targets, self.n_targets = targets, targets.numel()
        self.target_weights = weights


def run(loss, logits, targets):
    policy = TablePolicy(logits)
    output = loss(Targets(targets), Models(policy))
    output.loss_sum.backward()
    return output, policy.logits.grad


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, 5, generator=generator), torch.randint(5, (9,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_sft_equals_cross_entropy(table, smoothing):
    """Value and gradient are those of F.cross_entropy with the same label smoothing."""
    logits, targets = table
    output, grad = run(create_loss("sft", label_smoothing=smoothing), logits.clone(), targets)
    exact = logits.double().requires_grad_()
    want = F.cross_entropy(exact, targets, label_smoothing=smoothing, reduction="sum")
    want.backward()
    assert output.loss_sum.item() == pytest.approx(want.item(), rel=1e-5)
    assert output.num_items == 9
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_is_its_formula(table, gamma):
    """(1 - p)^gamma (-log p), the weight being part of the gradient."""
    logits, targets = table
    output, grad = run(create_loss("sft", focal_gamma=gamma), logits.clone(), targets)
    exact = logits.double().requires_grad_()
    logps = exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    want = (-((1 - logps.exp()) ** gamma) * logps).sum()
    want.backward()
    assert output.loss_sum.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_focal_loss_has_a_finite_gradient_at_certainty():
    """At p = 1 a power below one would have an infinite slope."""
    _, grad = run(create_loss("sft", focal_gamma=0.5), torch.tensor([[200.0, 0.0]]), torch.tensor([0]))
    assert torch.isfinite(grad).all()


def test_dft_on_two_equal_logits_is_half_of_sft():
    """p = 1/2: -p log p = log(2) / 2."""
    output, _ = run(create_loss("dft"), torch.zeros(1, 2), torch.tensor([0]))
    assert output.loss_sum.item() == pytest.approx(math.log(2) / 2, rel=1e-6)


def test_the_weight_of_dft_is_detached():
    """At p = 0.1 the target's logit gets p (p - 1) = -0.09, the sign of sft; with the weight attached it would be
    p (1 - p) (-1 - log p) = +0.117 (twinkle#291)."""
    logits = torch.tensor([[0.1, 0.9]]).log()
    _, grad = run(create_loss("dft"), logits, torch.tensor([0]))
    assert grad[0, 0].item() == pytest.approx(-0.09, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_dft_equals_its_formula(table, alpha):
    """-sg(alpha p + 1 - alpha) log p, summed over tokens; alpha 0 is sft."""
    logits, targets = table
    output, grad = run(create_loss("dft", dft_alpha=alpha), logits.clone(), targets)
    exact = logits.double().requires_grad_()
    logps = exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    want = -((alpha * logps.exp() + 1 - alpha).detach() * logps).sum()
    want.backward()
    assert output.loss_sum.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_the_default_of_dft_is_the_paper_and_not_sft():
    """DFT shipped with alpha 0 would silently be plain SFT."""
    assert create_loss("dft").options.dft_alpha == 1.0


def test_token_losses_log_perplexity_and_p_correct(table):
    """perplexity = exp(mean -log p) and avg_p_correct = mean p, from sums and weights."""
    logits, targets = table
    loss = create_loss("dft", dft_alpha=0.7)
    output, _ = run(loss, logits.clone(), targets)
    logps = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    figures = loss.finalize_metrics({name: (total / weight).item() for name, (total, weight) in output.metrics.items()})
    assert figures["perplexity"] == pytest.approx((-logps.mean()).exp().item(), rel=1e-5)
    assert figures["avg_p_correct"] == pytest.approx(logps.exp().mean().item(), rel=1e-5)
    assert figures["dft_alpha"] == 0.7


def test_unknown_names_and_options_are_refused():
    """The error lists what there is."""
    with raises(ConfigError, "not-a-choice", "'dtf'", "sft, dft"):
        create_loss("dtf")
    with raises(ConfigError, "unknown-option", "smoothing", "label_smoothing"):
        create_loss("sft", smoothing=0.1)


@pytest.mark.parametrize(
    ("name", "options", "code", "part"),
    [
        ("sft", {"label_smoothing": 2}, "out-of-range", "loss.label_smoothing: "),
        ("sft", {"label_smoothing": "much"}, "wrong-type", "loss.label_smoothing: "),
        ("sft", {"label_smoothing": math.nan}, "wrong-type", "loss.label_smoothing: "),
        ("dpo", {"beta": 0}, "out-of-range", "loss.beta: "),
        ("dpo", {"variant": "ippo"}, "not-a-choice", "Did you mean ipo"),
        ("dpo", {"gamma": 1.0}, "no-effect", "loss.gamma: "),
        ("policy", {"gae_lambda": 0.5}, "no-effect", "loss.advantage_estimator=gae"),
        ("policy", {"kl_coef": 0.1, "kl_estimator": "k1"}, "conflict", "loss.kl_estimator: "),
        ("kd", {"jsd_weight": 0.5}, "no-effect", "loss.divergence=jsd"),
    ],
)
def test_create_loss_refuses_what_a_config_refuses(name, options, code, part):
    """Limits, types, and options that have no effect or do not go together: the same words, from the same code."""
    with raises(ConfigError, code, part) as from_python:
        create_loss(name, **options)
    config = {"datasets": [str(Path(__file__))], "model": {"name_or_path": "tiny"}}
    with raises(ConfigError, code, part) as from_config:
        load_config(config | {"loss": {"name": name} | REQUIRED.get(name, {}) | options})
    assert str(from_python.value).split("loss.", 1)[1] in str(from_config.value)


def test_numbers_of_numpy_are_numbers():
    """As a sweep over np.linspace gives them."""
    assert create_loss("sft", label_smoothing=np.float64(0.25)).options.label_smoothing == 0.25
