"""Logps from hidden states and the LM head, without a [tokens, vocabulary] tensor.

The hidden states of N targets are multiplied by a [V, H] matrix, a chunk of tokens at a time. Only one [chunk, V]
buffer exists at a time.

The gradient needs the probabilities again. By default they are recomputed in the backward pass (4 matrix products in
total). If the weights w of a loss ``-sum w log p`` follow from the log-probabilities alone, as in SFT and DFT, the
gradient is computed in the forward pass (3 products, like the unchunked path). The backward pass then only checks that
the loss had these weights, and scales.

Products are in bfloat16 or float16 if the hardware supports that, but logits are accumulated and kept in float32:
rounded to the 8 bits of bfloat16, log-probabilities would be off by 0.03.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}  # size of one float32 [chunk, V] buffer


class LMHead(NamedTuple):
    """An output layer: logits = softcap * tanh(z / softcap), z = (hidden @ weight.T + bias) * scale.

    Attributes:
        weight: Shape [V, H].
        bias: Shape [V].
        scale: Factor of the logits.
        softcap: Bound of the logits.
        rows: Trained rows that replace those of a frozen weight, shape [n, H].
        row_ids: Token ids of `rows`, shape [n].
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    rows: Tensor | None = None  # [n, H]
    row_ids: Tensor | None = None  # [n]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight with its trained rows in `dtype`, shape [V, H]."""
        return matrix_of(self.weight, self.rows, self.row_ids, dtype)

    def at(self, temperature: float) -> "LMHead":
        """Return the head whose logits are divided by a temperature, after the softcap."""
        softcap = self.softcap and self.softcap / temperature  # c tanh(z/c) / t = (c/t) tanh((z/t) / (c/t))
        return self._replace(scale=self.scale / temperature, softcap=softcap)

    def first(self, n: int) -> "LMHead":
        """Return the head of the first n tokens of the vocabulary."""
        return self._replace(weight=self.weight[:n], bias=None if self.bias is None else self.bias[:n])


class TokenLogps(NamedTuple):
    logps: Tensor  # [N] float32
    entropy: Tensor | None  # [N] float32
    mean_logps: Tensor | None  # [N] float32


def chunked_logprobs(
    hidden: Tensor,
    targets: Tensor,
    layer: LMHead,
    detached_weight_fn: Callable[[Tensor], Tensor] | None = None,
    entropy: bool = False,
    mean_logps: bool = False,
    chunk: int | None = None,
) -> TokenLogps:
    """Return the log-probability of each target, and optionally the entropy and the mean over the vocabulary.

    The results are differentiable with respect to hidden, weight, bias and rows. N can be 0: the results are then
    empty, and their sums are zeros attached to the graph.

    Args:
        hidden: Hidden states that predict the targets, shape [N, H].
        targets: Token ids, int64, shape [N].
        layer: The LM head.
        detached_weight_fn: Maps log-probabilities [n] to weights w [n] of a loss ``-c * sum w log p``. It saves a
            matrix product. For any other loss, the gradient is still right.
        entropy: Compute the entropy of each distribution.
        mean_logps: Compute the mean log-probability over the vocabulary.
        chunk: Number of tokens per chunk; by default what fits into `CHUNK_BYTES`.

    Returns:
        Float32 tensors of shape [N]; None for those not requested.
    """
    if chunk is None:
        chunk = default_chunk(hidden, layer)
    dtype = matmul_dtype_of(hidden)
    if not torch.is_grad_enabled() or entropy or mean_logps or needs_loss_scale(dtype):
        detached_weight_fn = None
    settings = _Settings(layer, chunk, dtype, detached_weight_fn, entropy, mean_logps)
    # Autocast would cast the factors again in the forward pass.
    with torch.autocast(hidden.device.type, enabled=False), products_in(dtype):
        logps, entropies, means = _TokenLogps.apply(hidden, layer.weight, layer.bias, layer.rows, targets, settings)
    return TokenLogps(logps, entropies if entropy else None, means if mean_logps else None)


class _Settings(NamedTuple):
    layer: LMHead
    chunk: int
    matmul_dtype: torch.dtype
    detached_weight_fn: Callable[[Tensor], Tensor] | None
    entropy: bool
    mean_logps: bool


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, trained_rows, targets, settings):
        n = targets.numel()
        logps, lse, entropy, means = (hidden.new_empty(n, dtype=torch.float32) for _ in range(4))  # [N] each
        row_ids, grads, matrix = settings.layer.row_ids, None, None
        logit_matrix = matrix_of(weight, trained_rows, row_ids, logits_dtype(settings.matmul_dtype, weight.device.type))
        if settings.detached_weight_fn:
            grads = Gradients(hidden, weight, bias, trained_rows, row_ids, ctx.needs_input_grad)
            matrix = matrix_of(weight, trained_rows, row_ids, settings.matmul_dtype)  # [V, H]
        buffer = hidden.new_empty((min(n, settings.chunk), weight.shape[0]), dtype=torch.float32)  # [chunk, V]
        for start in range(0, n, settings.chunk):
            rows = slice(start, start + settings.chunk)
            states, target_ids = hidden[rows], targets[rows, None]  # [n, H], [n, 1]
            logits, slope = logits_of(
                states, logit_matrix, bias, settings.layer, grads is not None, buffer[: len(states)]
            )  # [n, V]
            target_logits = logits.gather(1, target_ids)[:, 0]  # [n]
            if grads:
                top = logits.amax(1)  # [n]
                total = logits.sub_(top[:, None]).exp_().sum(1)  # [n]
                lse[rows] = top + total.log()
            else:
                lse[rows] = torch.logsumexp(logits, 1)
            logps[rows] = target_logits - lse[rows]
            if grads:
                weights = settings.detached_weight_fn(logps[rows])  # [n]
                dlogits = logits.mul_((weights / total)[:, None])  # gradient of -sum w log p: w (p - 1 at the target)
                dlogits.scatter_add_(1, target_ids, -weights[:, None])
                grads.add(rows, backward_through_softcap(dlogits, slope, settings.layer), states, matrix)
            if settings.mean_logps or settings.entropy:
                logits.sub_(lse[rows, None])  # log-probabilities
                means[rows] = logits.mean(1)
            if settings.entropy:
                entropy[rows] = -(logits.exp() * logits).sum(1)
        ctx.settings, ctx.grads = settings, grads
        ctx.save_for_backward(hidden, weight, bias, trained_rows, targets, logps, lse, entropy)
        return logps, entropy, means

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy, grad_means):
        hidden, weight, bias, trained_rows, targets, logps, lse, entropy = ctx.saved_tensors
        settings, grads = ctx.settings, ctx.grads
        if grads is not None:
            factor = match_up_to_scale(grad_logps, -settings.detached_weight_fn(logps))
            if factor is not None:
                ctx.grads = None
                return *grads.scaled(factor), None, None
        row_ids = settings.layer.row_ids
        grads = Gradients(hidden, weight, bias, trained_rows, row_ids, ctx.needs_input_grad)
        logit_matrix = matrix_of(weight, trained_rows, row_ids, logits_dtype(settings.matmul_dtype, weight.device.type))
        matrix = matrix_of(weight, trained_rows, row_ids, settings.matmul_dtype)  # [V, H]
        buffer = hidden.new_empty((min(targets.numel(), settings.chunk), weight.shape[0]), dtype=torch.float32)
        with products_in(settings.matmul_dtype):
            for start in range(0, targets.numel(), settings.chunk):
                rows = slice(start, start + settings.chunk)
                states = hidden[rows]  # [n, H]
                logits, slope = logits_of(
                    states, logit_matrix, bias, settings.layer, True, buffer[: len(states)]
                )  # [n, V]
                logits.sub_(lse[rows, None])  # log-probabilities
                probs = logits.exp()  # [n, V]
                dlogits = probs * -(grad_logps[rows] + grad_means[rows])[:, None]
                if settings.entropy:
                    dlogits -= grad_entropy[rows, None] * probs * (logits + entropy[rows, None])
                if settings.mean_logps:
                    dlogits += grad_means[rows, None] / logits.shape[1]
                dlogits.scatter_add_(1, targets[rows, None], grad_logps[rows, None])
                grads.add(rows, backward_through_softcap(dlogits, slope, settings.layer), states, matrix)
        return *grads.scaled(None), None, None


class Gradients:
    """Sums of the gradients of hidden, weight, bias and rows over the chunks, in float32 or wider."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        trained_rows: Tensor | None,
        row_ids: Tensor | None,
        needed: tuple[bool, ...],
    ):
        self.dtypes = tuple(t.dtype if t is not None else None for t in (hidden, weight, bias, trained_rows))
        self.row_ids = row_ids
        dtype = compute_dtype(hidden)
        self.hidden = torch.zeros_like(hidden, dtype=dtype) if needed[0] else None  # [N, H]
        self.weight = torch.zeros_like(weight, dtype=dtype) if needed[1] else None  # [V, H]
        self.bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needed[2] else None  # [V]
        self.rows = torch.zeros_like(trained_rows, dtype=dtype) if needed[3] else None  # [n, H]

    def add(self, rows: slice, dlogits: Tensor, states: Tensor, matrix: Tensor) -> None:
        """Add the gradients of a chunk.

        Args:
            rows: The chunk's slice of the N targets.
            dlogits: Gradient of the logits before scale and softcap, float32 or wider, shape [n, V].
            states: Hidden states of the chunk, shape [n, H].
            matrix: The weight in the dtype of the matrix products, shape [V, H].
        """
        if self.bias is not None:
            self.bias += dlogits.sum(0)
        dlogits, states = dlogits.to(matrix.dtype), states.to(matrix.dtype)
        if self.hidden is not None:
            self.hidden[rows] = dlogits @ matrix
        if self.weight is not None and matrix.dtype == self.weight.dtype:
            self.weight.addmm_(dlogits.T, states)
        elif self.weight is not None:
            self.weight += dlogits.T @ states
        if self.rows is not None:
            self.rows += dlogits[:, self.row_ids].T @ states

    def scaled(self, factor: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients times `factor`, in the dtypes of their tensors."""
        if self.weight is not None and self.row_ids is not None:
            self.weight.index_fill_(0, self.row_ids, 0.0)  # these logits come from the trained rows
        grads = (self.hidden, self.weight, self.bias, self.rows)
        if factor is not None:
            grads = tuple(g if g is None else g.mul_(factor) for g in grads)
        return tuple(g if g is None else g.to(d) for g, d in zip(grads, self.dtypes, strict=True))


def default_chunk(hidden: Tensor, layer: LMHead, buffers: int = 1) -> int:
    """Return how many tokens fit into `CHUNK_BYTES`, with this many buffers of logits."""
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    return max(64, budget // (4 * buffers * layer.weight.shape[0]))


def matrix_of(weight: Tensor, rows: Tensor | None, row_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a weight in `dtype` with its rows at `row_ids` replaced, shape [V, H]."""
    matrix = weight.to(dtype)
    return matrix if rows is None else matrix.index_copy(0, row_ids, rows.to(dtype))


def logits_of(
    states: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    layer: LMHead,
    need_slope: bool,
    buffer: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Compute the logits of a chunk.

    Args:
        states: Hidden states, shape [n, H].
        matrix: The weight in the dtype of `logits_dtype`, shape [V, H].
        bias: Shape [V].
        layer: Has the scale and the softcap.
        need_slope: Also compute the derivative of the softcap.
        buffer: Receives the logits, shape [n, V].

    Returns:
        The logits, and the derivative of the softcap at them (None without a softcap), shape [n, V].
    """
    logits = _product(states.to(matrix.dtype), matrix.T, buffer)
    if bias is not None:
        logits += bias
    if layer.scale != 1.0:
        logits *= layer.scale
    if layer.softcap is None:
        return logits, None
    logits = logits.div_(layer.softcap).tanh_()
    slope = 1 - logits * logits if need_slope else None
    return logits.mul_(layer.softcap), slope


def _product(states: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """Return states [n, H] times matrix [H, V], written to `out`."""
    if states.dtype == out.dtype:
        return torch.mm(states, matrix, out=out)
    if states.dtype.itemsize == 2:
        return torch.mm(states, matrix, out_dtype=out.dtype, out=out)
    return out.copy_(states @ matrix)


@contextlib.contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """Within the context, round the factors of float32 products to bfloat16 on CPUs with AMX, if that is `dtype`.

    Sums stay in float32. This is many times faster with AMX. AVX512-BF16 alone would save a fifth, which is not worth
    the rounding.
    """
    options = torch.backends.mkldnn.matmul
    before = options.fp32_precision
    if dtype == torch.bfloat16 and cpu_has_amx():
        options.fp32_precision = "bf16"
    try:
        yield
    finally:
        options.fp32_precision = before


def backward_through_softcap(dlogits: Tensor, slope: Tensor | None, layer: LMHead) -> Tensor:
    """Convert the gradient of the logits to that of the matrix product, in place."""
    if slope is not None:
        dlogits.mul_(slope)
    return dlogits.mul_(layer.scale) if layer.scale != 1.0 else dlogits


def match_up_to_scale(grad: Tensor, expected: Tensor) -> Tensor | None:
    """Return c such that grad equals c * expected up to rounding, or None."""
    if grad.numel() == 0:
        return None
    largest = expected.abs().argmax()
    factor = grad[largest] / expected[largest]
    return factor if torch.allclose(grad, factor * expected, rtol=1e-6, atol=0.0) else None


def matmul_dtype_of(hidden: Tensor) -> torch.dtype:
    """Return the `autocast_dtype`; float32 if the processor would only emulate it."""
    return native_dtype(autocast_dtype(hidden), hidden.device.type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype inside autocast, else that of the tensor."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def native_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return `dtype` for matrix products on this device type, or float32 if it would be emulated."""
    emulated = {torch.bfloat16: not cpu_has_bfloat16(), torch.float16: not cpu_has_float16()}
    return torch.float32 if device_type == "cpu" and emulated.get(dtype, False) else dtype


def logits_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype of the factors of logits: `dtype`, or float32 if the product would be rounded to `dtype`."""
    return dtype if dtype.itemsize > 2 or keeps_float32_sums(device_type) else torch.float32


def keeps_float32_sums(device_type: str) -> bool:
    """Return whether bfloat16 and float16 products can return float32 on this device type; not on ROCm or the CPU."""
    return device_type == "cuda" and torch.version.hip is None


def needs_loss_scale(dtype: torch.dtype) -> bool:
    """Return whether gradients must be computed in the backward pass, where they include the loss scale.

    Without the scale, float16 would round the gradients of unlikely tokens to 0.
    """
    return dtype == torch.float16


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of logits and sums: float32, or wider if the states are."""
    return torch.promote_types(hidden.dtype, torch.float32)


def cpu_has_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 matrices in hardware."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))


def cpu_has_float16() -> bool:
    """Return whether this processor multiplies float16 matrices in hardware."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_fp16") or capabilities.get("avx512_fp16"))


def cpu_has_amx() -> bool:
    """Return whether this processor has AMX units for bfloat16 matrices."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
