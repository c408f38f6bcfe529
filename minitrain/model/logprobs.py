"""Logps from hidden states and the LM head, without a [tokens, vocabulary] tensor.

The hidden states of N targets are multiplied by a [V, H] matrix, a chunk of tokens at a time. Only one [chunk, V]
buffer exists at a time.

The gradient needs the probabilities again. By default they are recomputed in the backward pass (4 matrix products in
total). If the weights w of a loss ``-sum w log p`` follow from the log-probabilities alone, as in SFT and DFT, the
gradient is computed in the forward pass (3 products, like the unchunked path), and the backward pass scales it.

Products are in bfloat16 or float16 if the hardware supports that, but logits and the gradient of the weight are
accumulated and kept in float32: rounded to the 8 bits of bfloat16, log-probabilities would be off by 0.03.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .head_gradient import any_gradient, compiled, measures, shape_logits, split_gradient, weighted_gradient

USUAL_GPU_BYTES = 80 << 30  # memory of a GPU that this machine does not have


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
    log_sum_squares: Tensor | None = None  # [N] float32, without gradient
    loss_sum: Tensor | None = None  # [] float32


def chunked_logprobs(
    hidden: Tensor,
    targets: Tensor,
    layer: LMHead,
    detached_weight_fn: Callable[[Tensor], Tensor] | None = None,
    entropy: bool = False,
    mean_logps: bool = False,
    chunk: int | None = None,
    compile: bool = False,
    log_sum_squares: bool = False,
) -> TokenLogps:
    """Return the log-probability of each target, and optionally other measures of its distribution.

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
        chunk: Number of tokens per chunk; by default what fits into `chunk_bytes`.
        compile: Compile what is computed between the matrix products.
        log_sum_squares: Compute the log of the sum of the squared probabilities, which has no gradient.

    Returns:
        Float32 tensors of shape [N], None for those not requested; and `loss_sum`, the sum of -w log p if its gradient
        is computed in the forward pass. Only a loss of the log-probabilities must be compared with it in the backward
        pass, for which the host waits for the device.
    """
    if chunk is None:
        chunk = default_chunk(hidden, layer)
    dtype = matmul_dtype_of(hidden)
    measured = entropy, mean_logps, log_sum_squares
    if not torch.is_grad_enabled() or any(measured) or needs_loss_scale(dtype):
        detached_weight_fn = None
    settings = _Settings(layer, chunk, dtype, detached_weight_fn, measured, compile)
    # Autocast would cast the factors again in the forward pass.
    with torch.autocast(hidden.device.type, enabled=False), products_in(dtype):
        outputs = _TokenLogps.apply(hidden, layer.weight, layer.bias, layer.rows, targets, settings)
    requested = True, *measured, detached_weight_fn is not None
    return TokenLogps(*(output if wanted else None for output, wanted in zip(outputs, requested, strict=True)))


class _Settings(NamedTuple):
    layer: LMHead
    chunk: int
    matmul_dtype: torch.dtype
    detached_weight_fn: Callable[[Tensor], Tensor] | None
    measured: tuple[bool, bool, bool]  # entropy, mean_logps, log_sum_squares
    compile: bool

    def pointwise(self, function: Callable, logits: Tensor, bias: Tensor | None, ids: Tensor, *rest):
        """Call a function of `head_gradient` on the products that `logits_of` has not changed yet."""
        function = compiled(function) if self.compile else function
        return function(logits, bias, ids, self.layer.scale, self.layer.softcap, *rest)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, trained_rows, targets, settings):
        n = targets.numel()
        logps, lse, entropy, means, squares = (hidden.new_empty(n, dtype=torch.float32) for _ in range(5))  # [N] each
        row_ids, grads, matrix = settings.layer.row_ids, None, None
        logit_matrix = matrix_of(weight, trained_rows, row_ids, logits_dtype(settings.matmul_dtype, weight.device.type))
        if settings.detached_weight_fn:
            grads = Gradients(hidden, weight, bias, trained_rows, row_ids, ctx.needs_input_grad)
            matrix = matrix_of(weight, trained_rows, row_ids, settings.matmul_dtype)  # [V, H]
        buffer = hidden.new_empty((min(n, settings.chunk), weight.shape[0]), dtype=torch.float32)  # [chunk, V]
        for start in range(0, n, settings.chunk):
            rows = slice(start, start + settings.chunk)
            states, target_ids = hidden[rows], targets[rows, None]  # [n, H], [n, 1]
            products = product(states.to(logit_matrix.dtype), logit_matrix.T, buffer[: len(states)])  # [n, V]
            chunk = products, bias, target_ids
            if grads:
                rest = settings.detached_weight_fn, dlogits_dtype(settings, bias)
                logps[rows], lse[rows], dlogits = settings.pointwise(weighted_gradient, *chunk, *rest)
                grads.add(rows, dlogits, states, matrix)
                continue
            found = settings.pointwise(measures, *chunk, *settings.measured)
            for output, values in zip((logps, lse, entropy, means, squares), found, strict=True):
                if values is not None:
                    output[rows] = values
        ctx.settings, ctx.grads = settings, grads
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(squares)
        ctx.save_for_backward(hidden, weight, bias, trained_rows, targets, logps, lse, entropy)
        loss_sum = logps.new_zeros(()) if grads is None else -(settings.detached_weight_fn(logps) * logps).sum()  # []
        return logps, entropy, means, squares, loss_sum

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy, grad_means, _, grad_loss):
        hidden, weight, bias, trained_rows, targets, logps, lse, entropy = ctx.saved_tensors
        settings, grads, ctx.grads = ctx.settings, ctx.grads, None
        if settings.detached_weight_fn:
            of_logps = -settings.detached_weight_fn(logps)  # [N] the derivative of loss_sum
            factor, grad_logps = split_gradient(grad_loss, grad_logps, of_logps)
            if grads is not None and factor is not None:
                return *grads.scaled(factor), None, None
        if grad_logps is None:
            grad_logps = torch.zeros_like(logps)
        row_ids = settings.layer.row_ids
        grads = Gradients(hidden, weight, bias, trained_rows, row_ids, ctx.needs_input_grad)
        logit_matrix = matrix_of(weight, trained_rows, row_ids, logits_dtype(settings.matmul_dtype, weight.device.type))
        matrix = matrix_of(weight, trained_rows, row_ids, settings.matmul_dtype)  # [V, H]
        buffer = hidden.new_empty((min(targets.numel(), settings.chunk), weight.shape[0]), dtype=torch.float32)
        each = lse, grad_logps, grad_means, grad_entropy, entropy  # [N] each, or None
        with products_in(settings.matmul_dtype):
            for start in range(0, targets.numel(), settings.chunk):
                rows = slice(start, start + settings.chunk)
                states = hidden[rows]  # [n, H]
                products = product(states.to(logit_matrix.dtype), logit_matrix.T, buffer[: len(states)])  # [n, V]
                chunk = products, bias, targets[rows, None], *(None if x is None else x[rows] for x in each)
                dlogits = settings.pointwise(any_gradient, *chunk, dlogits_dtype(settings, bias))
                grads.add(rows, dlogits, states, matrix)
        return *grads.scaled(None), None, None


def dlogits_dtype(settings: _Settings, bias: Tensor | None) -> torch.dtype:
    """Return the dtype of the gradient of the logits: that of its products, unless a bias sums it in float32."""
    return settings.matmul_dtype if bias is None else torch.float32


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
            dlogits: Gradient of the logits before scale and softcap, shape [n, V].
            states: Hidden states of the chunk, shape [n, H].
            matrix: The weight in the dtype of the matrix products, shape [V, H].
        """
        if self.bias is not None:
            self.bias += dlogits.sum(0)
        dlogits, states = dlogits.to(matrix.dtype), states.to(matrix.dtype)
        if self.hidden is not None:
            product(dlogits, matrix, self.hidden[rows])
        if self.weight is not None:
            add_product(self.weight, dlogits.T, states)
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
    """Return how many tokens fit into `chunk_bytes`, with this many buffers of logits; on a GPU a multiple of 256."""
    chunk = chunk_bytes(hidden.device.type) // (4 * buffers * layer.weight.shape[0])
    return max(64, chunk) if hidden.device.type == "cpu" else max(256, chunk // 256 * 256)


def chunk_bytes(device_type: str) -> int:
    """Return the size of one float32 [chunk, V] buffer: on a GPU 1/64 of its memory, from 256 MiB to 2 GiB.

    It does not depend on the memory that is free, so that a resumed run computes the same chunks.
    """
    if device_type == "cpu":
        return 128 << 20
    has_gpu = device_type == "cuda" and torch.cuda.is_available()
    memory = torch.cuda.get_device_properties().total_memory if has_gpu else USUAL_GPU_BYTES
    return min(max(memory // 64, 256 << 20), 2 << 30)


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
    products = product(states.to(matrix.dtype), matrix.T, buffer)
    return shape_logits(products, bias, layer.scale, layer.softcap, need_slope)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Return a [m, k] times b [k, n], written to `out`. Where the hardware can, it is accumulated in `out`'s dtype."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.dtype.itemsize == 2 and keeps_float32_sums(a.device.type):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a [m, k] times b [k, n] to `total`, accumulated as in `product`."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if a.dtype.itemsize == 2 and keeps_float32_sums(a.device.type):
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(a @ b)


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
