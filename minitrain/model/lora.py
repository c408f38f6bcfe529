"""LoRA: a low-rank update of frozen weights (Hu et al. 2021, arXiv 2106.09685).

    y = x W^T + b + s (x A^T) B^T          A [r, in], B [out, r], s = alpha / r (rsLoRA: alpha / sqrt(r))

A and B are parameters of the layer that they adapt. So no parameter is renamed, and a sharding wrapper gathers them
together with the weight.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import token_rows
from .affine import affine_class
from .logprobs import LMHead, autocast_dtype
from .quantize import QuantizedLinear, dequantized

MATRICES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


@dataclass
class LoRASettings:
    """LoRA options of one layer."""

    rank: int
    scaling: float
    dropout: float = 0.0
    dora: bool = False


def adapt(module: nn.Module, settings: LoRASettings) -> None:
    """Add LoRA to a layer: matrices of zeros in float32, and the forward pass that uses them."""
    device = module.weight.device
    rows, columns = shape_of(module)
    names = ("lora_embedding_A", "lora_embedding_B") if isinstance(module, nn.Embedding) else ("lora_A", "lora_B")
    a = nn.Parameter(torch.zeros(settings.rank, columns, device=device, dtype=torch.float32))  # [r, in]
    b = nn.Parameter(torch.zeros(rows, settings.rank, device=device, dtype=torch.float32))  # [out, r]
    module.register_parameter(names[0], a)
    module.register_parameter(names[1], b)
    if settings.dora:
        module.lora_magnitude_vector = nn.Parameter(torch.zeros(rows, device=device, dtype=torch.float32))  # [out]
    module.lora = settings
    module.__class__ = _adapted(type(module))


def is_adaptable(module: nn.Module) -> bool:
    """Return whether LoRA can be added to a layer: an embedding, or one that computes x W^T + b."""
    if isinstance(module, (nn.Embedding, QuantizedLinear)):
        return True
    return affine_class(module, original_class(module)) is not None


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a layer without its LoRA and trained rows."""
    mixins = (_AdaptedLinear, _AdaptedEmbedding, *token_rows.MIXINS)
    return next(base for base in type(module).__mro__ if not issubclass(base, mixins))


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of the matrix W; an embedding maps one-hot token ids [in] to vectors [out]."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.nf, module.nx  # GPT-2's Conv1D, whose weight is [in, out]


def is_transposed(module: nn.Module) -> bool:
    """Return whether a layer's weight has the shape [in, out]."""
    return isinstance(module, (Conv1D, nn.Embedding))


def matrices(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] of a layer with LoRA."""
    if isinstance(module, nn.Embedding):
        return module.lora_embedding_A, module.lora_embedding_B
    return module.lora_A, module.lora_B


def merged_weight(module: nn.Module, weight: Tensor) -> Tensor:
    """Return `weight` of a layer with its LoRA merged, in float32 and with the layout of `weight`."""
    a, b = (matrix.detach().float() for matrix in matrices(module))
    base = weight.float().T if is_transposed(module) else weight.float()  # [out, in]
    total = base + module.lora.scaling * (b @ a)
    if module.lora.dora:
        total *= _normalized_magnitude(module, total)[:, None].detach()
    return total.T.contiguous() if is_transposed(module) else total


# ------------------------------------------------------------------------------------------------ initial values


def initial_values(
    method: str, weight: Callable[[], Tensor], module: nn.Module, name: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the initial A [r, in] and B [out, r], the same on every rank.

    Args:
        method: `default`: A uniform (Kaiming), B zero. `gaussian`: A normal with deviation 1/r, B zero. `pissa`: from
            the r largest singular values of W (arXiv 2404.02948). `olora`: from the first r columns of its QR
            decomposition (arXiv 2406.01775). For the last two, the caller subtracts the update from W, so that the
            sum is unchanged. Embeddings always have A zero and B normal.
        weight: Returns W [out, in] in float32.
        module: The layer.
        name: Its name, which with `seed` seeds the random values.
        seed: Seed of the run.
    """
    rank, (rows, columns) = module.lora.rank, shape_of(module)
    generator = seeded_generator(seed, name)
    if isinstance(module, nn.Embedding):
        return torch.zeros(rank, columns), torch.randn(rows, rank, generator=generator)
    if method == "pissa":
        left, values, right = torch.linalg.svd(weight(), full_matrices=False)
        signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()  # [1, k]; the same with any LAPACK
        roots = (values[:rank] / module.lora.scaling).sqrt()
        return roots[:, None] * (right * signs.T)[:rank], (left * signs)[:, :rank] * roots
    if method == "olora":
        orthogonal, upper = torch.linalg.qr(weight())
        return upper[:rank].contiguous(), orthogonal[:, :rank].contiguous()
    a = torch.empty(rank, columns)
    if method == "gaussian":
        a.normal_(std=1 / rank, generator=generator)
    else:
        a.uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=generator)
    return a, torch.zeros(rows, rank)


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator of random values that depend only on a seed and a name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# -------------------------------------------------------------------------------------------------- forward passes


@functools.cache
def _adapted(layer: type[nn.Module]) -> type[nn.Module]:
    mixin = _AdaptedEmbedding if issubclass(layer, nn.Embedding) else _AdaptedLinear
    return type(f"LoRA{layer.__name__}", (mixin, layer), {"is_fusible": layer is nn.Linear})


class _AdaptedLinear:
    """Mixin of adapted layers, before Linear, Conv1D or a quantized layer in their bases."""

    keeps_product = False  # whether the backward pass needs the product of x and W, so that it must not change

    def forward(self, x: Tensor) -> Tensor:
        lora = self.lora
        dropped = F.dropout(x, lora.dropout, self.training) if lora.dropout else x
        if dropped is x and not lora.dora and self.is_fusible:
            return _LoRALinear.apply(
                x, self.weight, self.bias, self.lora_A, self.lora_B, lora.scaling, self.keeps_product
            )
        y = super().forward(x)
        dtype = autocast_dtype(x)
        update = F.linear(F.linear(dropped, self.lora_A.to(dtype)), self.lora_B.to(dtype)) * lora.scaling
        if not lora.dora:
            return y + update.to(y.dtype)
        weight = dense_weight(self)  # [out, in]
        scale = dora_scales(self).to(y.dtype)  # [out]
        if dropped is x:
            plain = y if self.bias is None else y - self.bias
        else:
            plain = F.linear(dropped, weight.to(dtype))
        return y + (scale - 1) * plain + scale * update

    def as_output(self, hidden: Tensor, layer: LMHead) -> tuple[Tensor, LMHead]:
        """Return an input [N, K] and an LM head with a weight [V, K] whose product are the logits with LoRA.

        h W^T + s (h A^T) B^T = [h, s h A^T] [W, B]^T, and with DoRA's scales m of the rows
        h W^T + d ((m - 1) W)^T + s (d A^T) (m B)^T, where d is h after dropout.
        """
        lora, dtype = self.lora, hidden.dtype
        dropped = F.dropout(hidden, lora.dropout, self.training) if lora.dropout else hidden
        low = (F.linear(dropped, self.lora_A.to(dtype)) * lora.scaling).to(dtype)  # [N, r]
        weight, b = dense_weight(self), self.lora_B.to(self.weight.dtype)  # [V, H], [V, r]
        states, matrices = [hidden, low], [weight, b]
        if lora.dora:
            scale = dora_scales(self)[:, None].to(weight.dtype)  # [V, 1]
            if dropped is hidden:
                matrices = [scale * weight, scale * b]
            else:
                states, matrices = [hidden, dropped, low], [weight, (scale - 1) * weight, scale * b]
        return torch.cat(states, 1), layer._replace(weight=torch.cat(matrices, 1), rows=None, row_ids=None)


class _AdaptedEmbedding:
    def forward(self, ids: Tensor) -> Tensor:
        a, b = self.lora_embedding_A, self.lora_embedding_B
        y = super().forward(ids)
        update = F.linear(F.embedding(ids, a.T), b) * self.lora.scaling
        update = update * getattr(self, "embed_scale", 1.0)  # Gemma scales its embeddings
        if not self.lora.dora:
            return y + update.to(y.dtype)
        return (dora_scales(self) * (y + update)).to(y.dtype)


class _LoRALinear(torch.autograd.Function):
    """LoRA without dropout or DoRA. It adds the update in place, and saves the input once, in its own dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, keeps_product):
        dtype = autocast_dtype(x)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)  # [N, in]
        low = flat @ a.to(dtype).T  # [N, r]
        y = F.linear(flat, weight.to(dtype), None if bias is None else bias.to(dtype))  # [N, out]
        y = torch.addmm(y, low, b.to(dtype).T, alpha=scaling, out=None if keeps_product else y)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling, ctx.dtype = scaling, dtype
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], -1])  # autograd lets no model change a view in place

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, low = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1]).to(ctx.dtype)  # [N, in]
        grad = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)  # [N, out]
        grad_low = (grad @ b.to(ctx.dtype)).mul_(ctx.scaling)  # [N, r]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(ctx.dtype)).addmm_(grad_low, a.to(ctx.dtype)).view(x.shape).to(x.dtype)
        grad_weight = (grad.T @ flat).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        grad_a = (grad_low.T @ flat).to(a.dtype)
        grad_b = (grad.T @ low).mul_(ctx.scaling).to(b.dtype)
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None


def keep_products(block: nn.Module) -> None:
    """Keep the products of the adapted layers of a block for the backward pass."""
    for module in block.modules():
        if isinstance(module, _AdaptedLinear):
            module.keeps_product = True


def merge_lora_weights(module: nn.Module) -> None:
    """Merge the LoRA of a layer into its weight, in float32 and cast once, and restore the ordinary layer.

    A tied weight is untied first, so that the other layer does not change.
    """
    if token_rows.has_rows(module):
        token_rows.merge_rows(module)
    if hasattr(module, "lora"):
        weight = module.weight.detach()
        module.weight = nn.Parameter(merged_weight(module, weight).to(weight.dtype), requires_grad=False)
        for name in MATRICES:
            module._parameters.pop(name, None)
        del module.lora
    module.__class__ = original_class(module)


def dense_weight(module: nn.Module) -> Tensor:
    """Return W [out, in] of a layer, dequantized, with its trained rows."""
    weight = token_rows.put_rows(module, dequantized(module))
    return weight.T if is_transposed(module) else weight


def dora_scales(module: nn.Module) -> Tensor:
    """Return DoRA's scale of each row of W + sBA, in float32, shape [out].

    The gradient treats the norm of the row as a constant (section 4.3 of arXiv 2402.09353).
    """
    a, b = matrices(module)
    with torch.no_grad():
        total = dense_weight(module).float() + module.lora.scaling * (b @ a)  # [out, in]
    return _normalized_magnitude(module, total)


def _normalized_magnitude(module: nn.Module, total: Tensor) -> Tensor:
    """Return DoRA's scales for `total` = W + sBA [out, in]. A row of zeros has no direction, so any scale is right."""
    norm = total.norm(dim=1)
    return module.lora_magnitude_vector / torch.where(norm > 0, norm, 1.0)
