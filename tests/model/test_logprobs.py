"""The chunked head against plain float64 algebra."""

import pytest
import torch

from minitrain.model import logprobs
from minitrain.model.logprobs import LMHead, chunked_logprobs
from tests.tensors import Largest

pytestmark = pytest.mark.numeric

N, H, V = 11, 6, 17


def inputs(bias: bool, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    offset = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, offset, torch.randint(V, (N,), generator=generator)


def plain(hidden, weight, bias, targets, scale, softcap):
    """log p(target), entropy and mean log p, with the whole [N, V] table."""
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1)
    return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1), logps.mean(-1)


def double(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.5, 3.0, True), (2.0, None, True)])
def test_scores_and_gradients_equal_the_plain_path(scale, softcap, bias, chunk):
    """All three scores, any mix of their gradients, any chunk: the numbers of the full table."""
    hidden, weight, offset, targets = inputs(bias)
    exact = double((hidden, weight, offset))
    mix = torch.randn(3, N, generator=torch.Generator().manual_seed(1))
    got = chunked_logprobs(hidden, targets, LMHead(weight, offset, scale, softcap), None, True, True, chunk)
    want = plain(*exact, targets, scale, softcap)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    sum((a * m).sum() for a, m in zip(got, mix)).backward()
    sum((b * m).sum() for b, m in zip(want, mix)).backward()
    for a, b in zip((hidden, weight, offset), exact):
        if a is not None:
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("weigh", [torch.ones_like, lambda logps: 0.7 * logps.exp() + 0.3])
def test_gradients_of_the_single_pass_equal_the_plain_path(weigh):
    """With `detached_weight_fn` the gradient is made in the forward pass; it is that of -c * sum w log p."""
    hidden, weight, bias, targets = inputs(True)
    exact = double((hidden, weight, bias))
    logps = chunked_logprobs(hidden, targets, LMHead(weight, bias, 0.5, 3.0), weigh, chunk=4).logps
    (-3 * (weigh(logps.detach()) * logps).sum()).backward()
    want = plain(*exact, targets, 0.5, 3.0)[0]
    (-3 * (weigh(want.detach()) * want).sum()).backward()
    for a, b in zip((hidden, weight, bias), exact):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=2e-5)


def test_wrong_detached_weights_still_give_the_right_gradient():
    """When the loss is not the announced one, the backward pass notices and recomputes."""
    hidden, weight, _, targets = inputs(False)
    exact = double((hidden, weight))
    logps = chunked_logprobs(hidden, targets, LMHead(weight), torch.ones_like, chunk=4).logps
    (logps**2).sum().backward()
    (plain(*exact, None, targets, 1.0, None)[0] ** 2).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.grad.double(), exact[1].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0), (2.0, None)])
def test_a_temperature_divides_the_logits_after_the_softcap(scale, softcap):
    """Scores and gradients are those of the full table of logits / 0.6 (trl#3029)."""
    hidden, weight, bias, targets = inputs(True)
    exact = double((hidden, weight, bias))
    got = chunked_logprobs(hidden, targets, LMHead(weight, bias, scale, softcap).at(0.6), None, True, True, 4)
    logits = (exact[0] @ exact[1].T + exact[2]) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logps = (logits / 0.6).log_softmax(-1)
    want = logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1), logps.mean(-1)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    sum(a.sum() for a in got).backward()
    sum(b.sum() for b in want).backward()
    for a, b in zip((hidden, weight, bias), exact):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=2e-5)


def test_a_frozen_matrix_gets_no_gradient():
    """Only what requires a gradient gets one, in both ways of making it."""
    for weigh in (None, torch.ones_like):
        hidden, weight, _, targets = inputs(False)
        weight.requires_grad_(False)
        chunked_logprobs(hidden, targets, LMHead(weight), weigh).logps.sum().backward()
        assert hidden.grad is not None and weight.grad is None


@pytest.mark.parametrize("weigh", [None, torch.ones_like])
def test_no_supervised_token_gives_an_attached_zero(weigh):
    """A fully masked micro-batch: the loss is 0 and the gradients are zeros, not None and not NaN."""
    _, weight, _, _ = inputs(False)
    hidden = torch.zeros(0, H, requires_grad=True)
    loss = chunked_logprobs(hidden, torch.zeros(0, dtype=torch.long), LMHead(weight), weigh).logps.sum()
    loss.backward()
    assert loss == 0 and not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hardware", ["none", "products", "amx"])
@pytest.mark.parametrize("autocast", [False, True])
def test_log_softmax_is_done_in_float32(monkeypatch, dtype, hardware, autocast):
    """Half-precision matrices over 50,000 rows stay within 1e-3 of float64 on the same logits (OpenRLHF#634).

    So do the gradients, but for the rounding of the products that they come from.
    """
    pretend(monkeypatch, hardware)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(32, 64, generator=generator).to(dtype)
    weight = (torch.randn(50_000, 64, generator=generator) * 0.5).to(dtype)
    targets = torch.randint(50_000, (32,), generator=generator)
    exact = double((hidden, weight))
    want = (exact[0] @ exact[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    want.sum().backward()
    for weigh in (None, torch.ones_like):
        leaves = [t.to(torch.float32 if autocast else dtype, copy=True).requires_grad_() for t in (hidden, weight)]
        with torch.autocast("cpu", dtype, enabled=autocast):
            logps = chunked_logprobs(leaves[0], targets, LMHead(leaves[1]), weigh).logps
        logps.sum().backward()
        assert (logps.detach() - want.detach()).abs().max() < 1e-3
        for leaf, true in zip(leaves, exact):
            assert (leaf.grad.double() - true.grad).norm() < 1e-2 * true.grad.norm()


def pretend(monkeypatch, hardware: str) -> None:
    """Has the head act as on a processor that multiplies half-precision matrices, or not; or has AMX, too."""
    for name in ("cpu_has_bfloat16", "cpu_has_float16"):
        monkeypatch.setattr(logprobs, name, lambda: hardware != "none")
    monkeypatch.setattr(logprobs, "cpu_has_amx", lambda: hardware == "amx")


@pytest.mark.parametrize("hardware", ["none", "products"])
@pytest.mark.parametrize("likely", [-2.0, -9.0, -14.0])
def test_float16_gradients_of_unlikely_tokens_are_not_rounded_to_nothing(monkeypatch, hardware, likely):
    """DFT weighs a token by its probability; the loss scale lifts that into the range of float16."""
    pretend(monkeypatch, hardware)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, 64, generator=generator).half().requires_grad_()
    weight = (torch.randn(500, 64, generator=generator) * 0.2).half().requires_grad_()
    exact, scale = double((hidden, weight)), 2.0**16 / 16
    table = (exact[0] @ exact[1].T).log_softmax(-1)
    targets = (table.detach() - likely).abs().argmin(1)  # of about this log-probability
    want = table.gather(1, targets[:, None])[:, 0]
    (-scale * (want.detach().exp() * want).sum()).backward()
    logps = chunked_logprobs(hidden, targets, LMHead(weight), torch.exp).logps
    (-scale * (logps.detach().exp() * logps).sum()).backward()
    for leaf, true in zip((hidden, weight), exact):
        assert (leaf.grad.double() - true.grad).norm() < 1e-2 * true.grad.norm()


def test_no_table_of_tokens_by_vocabulary_is_ever_made():
    """Forward and backward hold no tensor larger than a chunk of it."""
    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    for weigh in (None, torch.ones_like):
        with Largest() as seen:
            chunked_logprobs(hidden, torch.zeros(512).long(), LMHead(weight), weigh, chunk=32).logps.sum().backward()
        assert seen.numel == 32 * 1000
