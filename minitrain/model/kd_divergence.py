"""The divergence of a policy's distribution from a teacher's, without a [tokens, vocabulary] tensor of either.

Both LM heads run on a chunk of tokens at a time. The gradient of ``a divergence - b log p`` is computed in the same
pass from the same logits (4 matrix products, like the unchunked path), and the backward pass scales it. For any other
loss it makes a second pass.

Two models with one tokenizer can pad their vocabularies to different sizes. The distributions are compared over the
tokens that both models have, and each is normalized over these.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minitrain.batch import Distillation, TopKLogprobs

from .head_gradient import add_at, compiled, shape_logits, split_gradient, through_softcap
from .logprobs import (
    Gradients,
    LMHead,
    compute_dtype,
    default_chunk,
    dlogits_dtype,
    logits_dtype,
    logits_of,
    matmul_dtype_of,
    matrix_of,
    native_dtype,
    needs_loss_scale,
    product,
    products_in,
)

BUFFERS = 2  # logits of policy and teacher, which share `CHUNK_BYTES`


def divergences(
    hidden: Tensor,
    targets: Tensor,
    layer: LMHead,
    distillation: Distillation,
    chunk: int | None = None,
    compile: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the log-probability of each target at temperature 1, and the divergence from the teacher.

    All are differentiable with respect to hidden, weight, bias and rows, but not the teacher. N can be 0: the results
    are then empty, and their sums are zeros attached to the graph.

    Args:
        hidden: Hidden states that predict the targets, shape [N, H].
        targets: Token ids, int64, shape [N].
        layer: The LM head of the policy.
        distillation: The teacher at the same tokens, the formula and the temperature.
        chunk: Number of tokens per chunk; by default what fits into `logprobs.chunk_bytes`.
        compile: Compile what is computed between the matrix products, unless tokens are selected with `top_k`.

    Returns:
        Two float32 tensors of shape [N], and the sum of their losses with `distillation.weights`, shape []. It is None
        if its gradient is not computed in the forward pass.
    """
    chunk = chunk or default_chunk(hidden, layer, BUFFERS)
    dtype = matmul_dtype_of(hidden)
    with_gradient = torch.is_grad_enabled() and not needs_loss_scale(dtype)
    settings = _Settings(layer, distillation, chunk, dtype, with_gradient, compile)
    with torch.autocast(hidden.device.type, enabled=False), products_in(dtype):
        outputs = _Divergences.apply(hidden, layer.weight, layer.bias, layer.rows, targets, settings)
    return *outputs[:2], outputs[2] if with_gradient else None


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
    compile: bool


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, trained_rows, targets, settings):
        weights = None
        if settings.with_gradient:
            weights = _weight_tensors(settings, hidden, targets)
        inputs = hidden, weight, bias, trained_rows, targets
        logps, divergence, ctx.grads = _run_chunks(*inputs, settings, weights, ctx.needs_input_grad)
        ctx.settings = settings
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        of_logps, of_divergence = _weights(settings)
        return logps, divergence, of_logps * logps.sum() + of_divergence * divergence.sum()

    @staticmethod
    def backward(ctx, grad_logps, grad_divergence, grad_loss):
        settings, grads, ctx.grads = ctx.settings, ctx.grads, None
        hidden, *_, targets = ctx.saved_tensors
        expected = torch.cat(_weight_tensors(settings, hidden, targets))  # [2 N]
        given = None
        if grad_loss is None or grad_logps is not None or grad_divergence is not None:
            zeros = torch.zeros_like(expected[: len(targets)])
            given = torch.cat([zeros if each is None else each for each in (grad_logps, grad_divergence)])  # [2 N]
        factor, total = split_gradient(grad_loss, given, expected)
        if grads is None or factor is None:
            factor, weights = None, (total[: len(targets)], total[len(targets) :])
            with products_in(settings.matmul_dtype):
                *_, grads = _run_chunks(*ctx.saved_tensors, settings, weights, ctx.needs_input_grad)
        return *grads.scaled(factor), None, None


def _weights(settings: _Settings) -> tuple[float, float]:
    """Return the expected weights of log p and of the divergence in the loss."""
    of_divergence, of_nll = settings.distillation.weights
    return -of_nll, of_divergence


def _weight_tensors(settings: _Settings, hidden: Tensor, targets: Tensor) -> list[Tensor]:
    """Return the expected weights of each target, shape [N] each."""
    return [hidden.new_full(targets.shape, weight, dtype=compute_dtype(hidden)) for weight in _weights(settings)]


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
    is_compiled = settings.compile and isinstance(teacher, _TeacherHead) and distillation.top_k is None
    compare = compiled(_compare_chunk) if is_compiled else _compare_chunk
    form = settings.layer.scale, settings.layer.softcap
    for start in range(0, n, settings.chunk):
        rows = slice(start, start + settings.chunk)
        states, target_ids = hidden[rows], targets[rows, None]  # [n, H], [n, 1]
        products = product(states.to(logit_matrix.dtype), logit_matrix.T, buffer[: len(states)])  # [n, V]
        theirs = _teacher_values(rows, teacher, distillation, n_tokens, dtype)
        of_chunk = None if weights is None else [w[rows, None] for w in weights]  # [n, 1] each
        rest = theirs, distillation, n_tokens, of_chunk, dlogits_dtype(settings, bias)
        logps[rows], divergence[rows], dlogits = compare(products, bias, target_ids, *form, *rest)
        if grads is not None:
            grads.add(rows, dlogits, states, matrix)
    return logps, divergence, grads


def _teacher_values(
    rows: slice, teacher: _TeacherHead | TopKLogprobs, distillation: Distillation, n_tokens: int, dtype: torch.dtype
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the teacher's logits [n, n_tokens], or the ids [n, k] and logps [n, k + 1] of its k likeliest tokens."""
    if isinstance(teacher, TopKLogprobs):
        return teacher.ids[rows].long(), teacher.logps[rows].to(dtype)
    logits = teacher.logits(rows)[:, :n_tokens].div_(distillation.temperature)
    return logits if distillation.top_k is None else _top_k(logits, min(distillation.top_k, n_tokens))


def _compare_chunk(
    products: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: float,
    softcap: float | None,
    theirs: Tensor | tuple[Tensor, Tensor],
    distillation: Distillation,
    n_tokens: int,
    weights: list[Tensor] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log p of the ids [n], the divergence [n], and the gradient of their weighted sum in `dtype` [n, V].

    Args:
        products: Those of the policy's LM head, shape [n, V]; they are overwritten.
        theirs: What `_teacher_values` returns; it is overwritten.
        weights: Weights of log p and of the divergence, shape [n, 1] each; None computes no gradient.
    """
    temperature = distillation.temperature
    logits, slope = shape_logits(products, bias, scale, softcap, weights is not None)  # [n, V]
    lse = logits.logsumexp(1, keepdim=True)  # [n, 1]
    logps = (logits.gather(1, ids) - lse)[:, 0]  # [n]
    tempered = logits[:, :n_tokens] / temperature  # [n, n_tokens]
    if isinstance(theirs, tuple):
        divergence, gradient = _compare_top_k(tempered, *theirs, distillation.formula)  # [n], [n, n_tokens]
    else:
        divergence, gradient = _compare(tempered, theirs, distillation.formula)
    if weights is None:
        return logps, divergence, None
    of_logp, of_divergence = weights  # [n, 1]
    dlogits = logits.sub_(lse).exp_().mul_(-of_logp)  # gradient of w log p: w (1 at the target - p)
    dlogits = add_at(dlogits, ids, of_logp)
    dlogits[:, :n_tokens].addcmul_(gradient, of_divergence / temperature)
    return logps, divergence, through_softcap(dlogits, slope, scale).to(dtype)


def _compare(logits: Tensor, theirs: Tensor, formula) -> tuple[Tensor, Tensor]:
    """Return the divergence of a chunk [n], and its gradient [n, V] with respect to `logits`.

    Both logits [n, V] are divided by the temperature; they are overwritten.
    """
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
