"""The divergence of a policy's distribution from a teacher's, without a [tokens, vocabulary] tensor of either.

Both LM heads run on a chunk of tokens at a time. The gradient of ``a divergence - b log p`` is computed in the same
pass from the same logits (4 matrix products, like the unchunked path). The backward pass checks that the loss has this
form, and scales. For any other loss it makes a second pass.

Two models with one tokenizer can pad their vocabularies to different sizes. The distributions are compared over the
tokens that both models have, and each is normalized over these.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minitrain.batch import Distillation, TopKLogprobs

from .logprobs import (
    Gradients,
    LMHead,
    backward_through_softcap,
    compute_dtype,
    default_chunk,
    logits_dtype,
    logits_of,
    match_up_to_scale,
    matmul_dtype_of,
    matrix_of,
    native_dtype,
    needs_loss_scale,
    products_in,
)

BUFFERS = 2  # logits of policy and teacher, which share `CHUNK_BYTES`


def divergences(
    hidden: Tensor, targets: Tensor, layer: LMHead, distillation: Distillation, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target at temperature 1, and the divergence from the teacher.

    Both are differentiable with respect to hidden, weight, bias and rows, but not the teacher. N can be 0: the results
    are then empty, and their sums are zeros attached to the graph.

    Args:
        hidden: Hidden states that predict the targets, shape [N, H].
        targets: Token ids, int64, shape [N].
        layer: The LM head of the policy.
        distillation: The teacher at the same tokens, the formula and the temperature.
        chunk: Number of tokens per chunk; by default what fits into `logprobs.CHUNK_BYTES`.

    Returns:
        Two float32 tensors of shape [N].
    """
    chunk = chunk or default_chunk(hidden, layer, BUFFERS)
    dtype = matmul_dtype_of(hidden)
    with_gradient = torch.is_grad_enabled() and not needs_loss_scale(dtype)
    settings = _Settings(layer, distillation, chunk, dtype, with_gradient)
    with torch.autocast(hidden.device.type, enabled=False), products_in(dtype):
        return _Divergences.apply(hidden, layer.weight, layer.bias, layer.rows, targets, settings)


@torch.no_grad()
def top_k_logprobs(hidden: Tensor, layer: LMHead, temperature: float, k: int, chunk: int | None = None) -> TopKLogprobs:
    """Return the k likeliest next tokens for each hidden state [N, H], and all other tokens as one outcome."""
    chunk, n = chunk or default_chunk(hidden, layer, BUFFERS), len(hidden)
    head = _TeacherHead(hidden, layer, chunk)
    ids = hidden.new_empty((n, k), dtype=torch.int64)
    logps = hidden.new_empty((n, k + 1), dtype=compute_dtype(hidden))
    with torch.autocast(hidden.device.type, enabled=False), products_in(layer.weight.dtype):
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            ids[rows], logps[rows] = _top_k(head.logits(rows).div_(temperature), k)
    return TopKLogprobs(ids, logps, head.n_tokens)


class _TeacherHead:
    """A teacher's hidden states [N, H] and LM head, with the buffers for one pass over them."""

    def __init__(self, hidden: Tensor, layer: LMHead, chunk: int):
        self.hidden, self.layer, self.n_tokens = hidden, layer, layer.weight.shape[0]  # V
        device_type = hidden.device.type
        self.matrix = layer.matrix(logits_dtype(native_dtype(layer.weight.dtype, device_type), device_type))  # [V, H]
        size = min(chunk, len(hidden)), self.n_tokens
        self.buffer = hidden.new_empty(size, dtype=compute_dtype(hidden))  # [chunk, V]

    def logits(self, rows: slice) -> Tensor:
        """Return logits [n, V] in a buffer that the next call overwrites."""
        states = self.hidden[rows]  # [n, H]
        return logits_of(states, self.matrix, self.layer.bias, self.layer, False, self.buffer[: len(states)])[0]


class _Settings(NamedTuple):
    layer: LMHead
    distillation: Distillation
    chunk: int
    matmul_dtype: torch.dtype
    with_gradient: bool


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, trained_rows, targets, settings):
        weights = None
        if settings.with_gradient:
            dtype = compute_dtype(hidden)
            weights = [hidden.new_full(targets.shape, number, dtype=dtype) for number in _weights(settings)]
        inputs = hidden, weight, bias, trained_rows, targets
        logps, divergence, ctx.grads = _run_chunks(*inputs, settings, weights, ctx.needs_input_grad)
        ctx.settings = settings
        ctx.save_for_backward(*inputs)
        return logps, divergence

    @staticmethod
    def backward(ctx, grad_logps, grad_divergence):
        expected = [torch.full_like(grad_logps, number) for number in _weights(ctx.settings)]
        factor = match_up_to_scale(torch.cat([grad_logps, grad_divergence]), torch.cat(expected))
        grads, ctx.grads = ctx.grads, None
        if grads is None or factor is None:
            factor = None
            weights = grad_logps, grad_divergence
            with products_in(ctx.settings.matmul_dtype):
                *_, grads = _run_chunks(*ctx.saved_tensors, ctx.settings, weights, ctx.needs_input_grad)
        return *grads.scaled(factor), None, None


def _weights(settings: _Settings) -> tuple[float, float]:
    """Return the expected weights of log p and of the divergence in the loss."""
    of_divergence, of_nll = settings.distillation.weights
    return -of_nll, of_divergence


def _run_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    trained_rows: Tensor | None,
    targets: Tensor,
    settings: _Settings,
    weights: tuple[Tensor, Tensor] | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Gradients | None]:
    """Compute log p and the divergence of all targets.

    Args:
        hidden: Shape [N, H].
        weight: The LM head's weight, shape [V, H].
        bias: Shape [V].
        trained_rows: Trained rows of the weight, shape [n, H].
        targets: Token ids, shape [N].
        settings: Options of the pass.
        weights: Weights of log p and of the divergence in the loss, shape [N] each; None computes no gradients.
        needed: Which of the first four inputs need a gradient.

    Returns:
        log p [N], the divergence [N], and the gradients of their weighted sum.
    """
    distillation, n, dtype = settings.distillation, targets.numel(), compute_dtype(hidden)
    teacher = distillation.teacher
    if not isinstance(teacher, TopKLogprobs):
        teacher = _TeacherHead(*teacher, settings.chunk)
    n_tokens = min(weight.shape[0], teacher.n_tokens)
    logps, divergence = (hidden.new_empty(n, dtype=dtype) for _ in range(2))  # [N]
    row_ids, grads, matrix = settings.layer.row_ids, None, None
    logit_matrix = matrix_of(weight, trained_rows, row_ids, logits_dtype(settings.matmul_dtype, weight.device.type))
    if weights is not None:
        grads = Gradients(hidden, weight, bias, trained_rows, row_ids, needed)
        matrix = matrix_of(weight, trained_rows, row_ids, settings.matmul_dtype)  # [V, H]
    buffer = hidden.new_empty((min(n, settings.chunk), weight.shape[0]), dtype=dtype)  # [chunk, V]
    for start in range(0, n, settings.chunk):
        rows = slice(start, start + settings.chunk)
        states, target_ids = hidden[rows], targets[rows, None]  # [n, H], [n, 1]
        chunk_buffer = buffer[: len(states)]
        logits, slope = logits_of(states, logit_matrix, bias, settings.layer, grads is not None, chunk_buffer)  # [n, V]
        lse = logits.logsumexp(1, keepdim=True)  # [n, 1]
        logps[rows] = (logits.gather(1, target_ids) - lse)[:, 0]
        tempered = logits[:, :n_tokens] / distillation.temperature  # [n, n_tokens]
        divergence[rows], gradient = _compare(tempered, rows, teacher, distillation)  # [n], [n, n_tokens]
        if grads is not None:
            of_logp, of_divergence = (w[rows, None] for w in weights)  # [n, 1]
            dlogits = logits.sub_(lse).exp_().mul_(-of_logp)  # gradient of w log p: w (1 at the target - p)
            dlogits.scatter_add_(1, target_ids, of_logp)
            dlogits[:, :n_tokens].addcmul_(gradient, of_divergence / distillation.temperature)
            grads.add(rows, backward_through_softcap(dlogits, slope, settings.layer), states, matrix)
    return logps, divergence, grads


def _compare(
    logits: Tensor, rows: slice, teacher: _TeacherHead | TopKLogprobs, distillation: Distillation
) -> tuple[Tensor, Tensor]:
    """Return the divergence of a chunk [n], and its gradient [n, V] with respect to `logits`.

    `logits` are the student's, divided by the temperature; they are overwritten.
    """
    formula, n_tokens = distillation.formula, logits.shape[1]
    if isinstance(teacher, TopKLogprobs):
        return _compare_top_k(logits, teacher.ids[rows].long(), teacher.logps[rows].to(logits.dtype), formula)
    theirs = teacher.logits(rows)[:, :n_tokens].div_(distillation.temperature)  # [n, V]
    if distillation.top_k is not None:
        return _compare_top_k(logits, *_top_k(theirs, min(distillation.top_k, n_tokens)), formula)
    student, theirs = (table.sub_(table.logsumexp(1, keepdim=True)) for table in (logits, theirs))
    divergence, slope = formula(student, theirs)
    return divergence, slope.addcmul_(student.exp_(), -slope.sum(1, keepdim=True))


def _compare_top_k(logits: Tensor, ids: Tensor, teacher: Tensor, formula) -> tuple[Tensor, Tensor]:
    """Do the same over k tokens [n, k] and the rest as one outcome; `teacher` has logps [n, k + 1]."""
    k = ids.shape[1]
    student, rest_probs = _outcomes(logits, ids)  # [n, k + 1], [n, V]
    if k == logits.shape[1]:  # the rest is empty
        student, teacher = student[:, :k], teacher[:, :k]
    divergence, slope = formula(student, teacher)
    gradient = slope - student.exp() * slope.sum(1, keepdim=True)  # [n, k + 1] of the outcomes' logits
    if k < logits.shape[1]:
        rest_probs.mul_(gradient[:, k:])  # spread over the tokens of the rest
    return divergence, rest_probs.scatter_(1, ids, gradient[:, :k])


def _top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ids [n, k] of the k likeliest tokens and the logps [n, k + 1]; overwrite the logits [n, V]."""
    ids = logits.topk(k).indices
    return ids, _outcomes(logits, ids)[0]


def _outcomes(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logps [n, k + 1] of the tokens `ids` [n, k] and of the rest, and each token's probability in the rest.

    These probabilities [n, V] overwrite `logits`.
    """
    top = logits.gather(1, ids)  # [n, k]
    rest_probs = logits.scatter_(1, ids, -torch.inf)
    peak = rest_probs.amax(1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)  # -inf if the rest is empty
    total = rest_probs.sub_(peak).exp_().sum(1, keepdim=True)  # [n, 1]
    rest = peak + total.log()
    return torch.cat([top, rest], 1).log_softmax(1), rest_probs.div_(total.clamp_min(1))
