"""The chunked head against plain float64 algebra."""

import functools
from types import SimpleNamespace

import pytest
import torch

from minitrain.model import head_gradient, logprobs
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


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("weigh", [torch.ones_like, lambda logps: 0.7 * logps.exp() + 0.3])
def test_the_loss_of_the_single_pass(weigh, both, monkeypatch):
    """`loss_sum` is -sum w log p, and its gradient needs no look at any value; a loss can use it and `logps`."""
    hidden, weight, bias, targets = inputs(True)
    exact = double((hidden, weight, bias))
    got = chunked_logprobs(hidden, targets, LMHead(weight, bias, 0.5, 3.0), weigh, chunk=4)
    want = plain(*exact, targets, 0.5, 3.0)[0]
    loss = -(weigh(want.detach()) * want).sum()
    torch.testing.assert_close(got.loss_sum.double(), loss, rtol=1e-5, atol=1e-5)
    if not both:
        monkeypatch.setattr(head_gradient, "match_up_to_scale", None)
    (3 * got.loss_sum + both * (got.logps**2).sum()).backward()
    (3 * loss + both * (want**2).sum()).backward()
    for a, b in zip((hidden, weight, bias), exact):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


def as_on_cuda(monkeypatch) -> list[str]:
    """Has the head act as on a CUDA device, whose products add up in float32; returns the products that it makes."""
    made, mm, addmm = [], torch.mm, torch.addmm

    def sums(a, b, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(a, b, out=out)
        made.append(f"mm {a.dtype} to {out_dtype}")
        return mm(a.to(out_dtype), b.to(out_dtype), out=out)  # exact: a product of two bfloat16 fits into float32

    def adds(total, a, b, out_dtype, out):
        made.append(f"addmm {a.dtype} to {out_dtype}")
        assert out is total
        return addmm(total, a.to(out_dtype), b.to(out_dtype), out=out)

    monkeypatch.setattr(torch, "mm", sums)
    monkeypatch.setattr(torch, "addmm", adds)
    for name in ("keeps_float32_sums", "cpu_has_bfloat16"):
        monkeypatch.setattr(logprobs, name, lambda *_: True)
    return made


@pytest.mark.parametrize("weigh", [None, torch.ones_like])
def test_products_of_a_gpu_add_up_in_float32(monkeypatch, weigh):
    """No logit and no gradient of a chunk is rounded to bfloat16 on its way to a sum; only the factors are."""
    made = as_on_cuda(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16().float().requires_grad_()
    weight = torch.randn(3000, 32, generator=generator).bfloat16().float().requires_grad_()
    exact, targets = double((hidden, weight)), torch.randint(3000, (64,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        got = chunked_logprobs(hidden, targets, LMHead(weight), weigh, chunk=16)
    want = plain(*exact, None, targets, 1.0, None)[0]
    torch.testing.assert_close(got.logps.double(), want, rtol=1e-5, atol=1e-5)
    (-got.logps.sum() if weigh is None else got.loss_sum).backward()
    (-want.sum()).backward()
    for a, b in zip((hidden, weight), exact):  # the gradient of a logit is rounded once, to 8 bits
        assert (a.grad.double() - b.grad).norm() < 2e-3 * b.grad.norm()
    assert set(made) == {"mm torch.bfloat16 to torch.float32", "addmm torch.bfloat16 to torch.float32"}
    assert len(made) == 4 * (4 if weigh is None else 3)  # products a chunk


@pytest.mark.parametrize("weigh", [None, lambda logps: 0.7 * logps.exp() + 0.3])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.5, 3.0, True)])
def test_what_is_compiled_is_the_same(monkeypatch, scale, softcap, bias, weigh):
    """The functions between the products give the same numbers in a graph, chunks of two sizes included."""
    eager = functools.cache(lambda function: torch.compile(function, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(logprobs, "compiled", eager)
    found = []
    for compile in (False, True):
        hidden, weight, offset, targets = inputs(bias)
        rest = weigh, weigh is None, weigh is None, 4, compile
        got = chunked_logprobs(hidden, targets, LMHead(weight, offset, scale, softcap), *rest)
        total = (got.logps**2 + got.entropy + 2 * got.mean_logps).sum() if weigh is None else got.loss_sum
        total.backward()
        found.append([total, got.logps, hidden.grad, weight.grad] + ([offset.grad] if bias else []))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_suit_the_card(monkeypatch):
    """1/64 of its memory, within bounds, in multiples of 256 rows; on the CPU as ever."""
    layer, hidden = LMHead(torch.empty(128_256, 8, device="meta")), torch.empty(1, 8, device="meta")
    sizes = {}
    for gigabytes in (8, 24, 80, 141):
        properties = SimpleNamespace(total_memory=gigabytes << 30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda properties=properties: properties)
        chunk_bytes = logprobs.chunk_bytes("cuda")
        monkeypatch.setattr(logprobs, "chunk_bytes", lambda _, size=chunk_bytes: size)
        sizes[gigabytes] = chunk_bytes >> 20, logprobs.default_chunk(hidden, layer)
        monkeypatch.undo()
    assert sizes == {8: (256, 512), 24: (384, 768), 80: (1280, 2560), 141: (2048, 4096)}
    assert logprobs.default_chunk(hidden.new_empty(1, 8, device="cpu"), layer) == (128 << 20) // (4 * 128_256)


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
    sum(a.sum() for a in got[:3]).backward()
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
