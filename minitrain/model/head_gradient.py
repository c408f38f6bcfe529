"""What the LM head computes between its matrix products, for a chunk of n tokens: logits, log-probabilities, gradients.

Each function can be compiled; then it reads the [n, V] products once or twice, and writes its [n, V] result once.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def compiled(function: Callable) -> Callable:
    """Return a function of this module or of `kd_divergence`, compiled for chunks of any size."""
    return torch.compile(function, dynamic=True)


def shape_logits(
    products: Tensor, bias: Tensor | None, scale: float, softcap: float | None, need_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Return logits = softcap * tanh(z / softcap), z = (products + bias) * scale, and their slope, shape [n, V].

    The logits overwrite the products. The slope of the softcap is None without one, and unless it is needed.
    """
    logits = products.clone() if torch.compiler.is_compiling() else products  # else the products would be written, too
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is None:
        return logits, None
    logits = logits.div_(softcap).tanh_()
    slope = 1 - logits * logits if need_slope else None
    return logits.mul_(softcap), slope


def through_softcap(dlogits: Tensor, slope: Tensor | None, scale: float) -> Tensor:
    """Convert the gradient of the logits to that of the matrix product, in place."""
    if slope is not None:
        dlogits.mul_(slope)
    return dlogits.mul_(scale) if scale != 1.0 else dlogits


def add_at(dlogits: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Add values [n, 1] to a gradient [n, V] at ids [n, 1], in place."""
    if torch.compiler.is_compiling():  # a scatter could not be part of the same kernel
        is_target = torch.arange(dlogits.shape[1], device=ids.device) == ids  # [n, V]
        return dlogits + torch.where(is_target, values, 0.0)
    return dlogits.scatter_add_(1, ids, values)


def measures(
    products: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: float,
    softcap: float | None,
    entropy: bool,
    mean: bool,
    squares: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return measures of the distributions at the ids [n, 1]: log-probabilities, log-sum-exps and, if requested,
    entropies, means over the vocabulary, and logs of the sums of squared probabilities; shape [n]."""
    logits, _ = shape_logits(products, bias, scale, softcap, False)
    target_logits = logits.gather(1, ids)[:, 0]  # [n]
    lse = torch.logsumexp(logits, 1)  # [n]
    if not (entropy or mean or squares):
        return target_logits - lse, lse, None, None, None
    logps = logits.sub_(lse[:, None])  # [n, V]
    means = logps.mean(1) if mean else None
    entropies = -(logps.exp() * logps).sum(1) if entropy else None
    return target_logits - lse, lse, entropies, means, logps.exp().square().sum(1).log() if squares else None


def weighted_gradient(
    products: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: float,
    softcap: float | None,
    weight_fn: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities [n], log-sum-exps [n], and the gradient of the loss -sum w log p, w = weight_fn(log p).

    Returns:
        The gradient is that of the products, in `dtype`, shape [n, V].
    """
    logits, slope = shape_logits(products, bias, scale, softcap, True)
    target_logits = logits.gather(1, ids)[:, 0]  # [n]
    top = logits.amax(1)  # [n]
    total = logits.sub_(top[:, None]).exp_().sum(1)  # [n]
    lse = top + total.log()
    weights = weight_fn(target_logits - lse)  # [n]
    dlogits = logits.mul_((weights / total)[:, None])  # gradient of -sum w log p: w (p - 1 at the target)
    dlogits = add_at(dlogits, ids, -weights[:, None])
    return target_logits - lse, lse, through_softcap(dlogits, slope, scale).to(dtype)


def any_gradient(
    products: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scale: float,
    softcap: float | None,
    lse: Tensor,
    grad_logps: Tensor,
    grad_means: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of the products in `dtype` [n, V], for gradients [n] of what `measures` returns."""
    logits, slope = shape_logits(products, bias, scale, softcap, True)
    logps = logits.sub_(lse[:, None])  # [n, V]
    of_probs = -(grad_logps if grad_means is None else grad_logps + grad_means)[:, None]  # [n, 1]
    if grad_entropy is None:
        dlogits = logps.exp_().mul_(of_probs)
    else:
        probs = logps.exp()  # [n, V]
        dlogits = probs * of_probs
        dlogits -= grad_entropy[:, None] * probs * (logps + entropy[:, None])
    if grad_means is not None:
        dlogits += grad_means[:, None] / dlogits.shape[1]
    dlogits = add_at(dlogits, ids, grad_logps[:, None])
    return through_softcap(dlogits, slope, scale).to(dtype)


def split_gradient(
    grad_loss: Tensor | None, grad_logps: Tensor | None, of_logps: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Compare the gradients of `loss_sum` [] and of log-probabilities [N] with what the forward pass has prepared.

    Args:
        of_logps: The derivative of `loss_sum` with respect to the log-probabilities, shape [N].

    Returns:
        The factor of the prepared gradient, or None if it is of no use; and the gradient of the log-probabilities [N].
    """
    if grad_loss is None:
        return (None if grad_logps is None else match_up_to_scale(grad_logps, of_logps)), grad_logps
    if grad_logps is None:
        return grad_loss, grad_loss * of_logps
    return None, grad_logps + grad_loss * of_logps


def match_up_to_scale(grad: Tensor, expected: Tensor) -> Tensor | None:
    """Return c such that grad equals c * expected up to rounding, or None."""
    if grad.numel() == 0:
        return None
    largest = expected.abs().argmax()
    factor = grad[largest] / expected[largest]
    return factor if torch.allclose(grad, factor * expected, rtol=1e-6, atol=0.0) else None
