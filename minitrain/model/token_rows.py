"""Rows of frozen embeddings that are trained alone: those of tokens that are new to a model.

    embedding:     the vector of a token in `token_ids` is its row of `token_rows` [n, H], not that of the weight
    output layer:  its logit is hidden @ row

The rows are parameters of the layers that they belong to, one parameter where two layers are tied, as PEFT has it
(`trainable_token_indices`).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "token_rows"


def add(module: nn.Module, ids: list[int], rows: nn.Parameter | None = None) -> nn.Parameter:
    """Give an embedding or a linear layer rows for these token ids, in ascending order; return the rows.

    Args:
        rows: Those of a tied layer. New ones are zeros in float32, on the device of the weight.
    """
    weight = module.weight
    device = weight.device if not weight.is_meta else None
    module.register_buffer("token_ids", torch.tensor(ids, device=device), persistent=False)  # [n]
    if rows is None:
        rows = nn.Parameter(torch.zeros(len(ids), weight.shape[1], dtype=torch.float32, device=weight.device))  # [n, H]
    module.register_parameter(NAME, rows)
    module.__class__ = _with_rows(type(module))
    return rows


def has_rows(module: nn.Module) -> bool:
    return NAME in module._parameters


def put_rows(module: nn.Module, weight: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return a weight [V, H] of the layer with its trained rows in place, in the dtype of `weight`.

    Args:
        rows: The rows of a sharded layer, whole; None for those of the layer itself.
    """
    if not has_rows(module):
        return weight
    rows = module.token_rows if rows is None else rows
    return weight.index_copy(0, module.token_ids, rows.to(weight.dtype))


def fold(module: nn.Module) -> None:
    """Write the rows into the weight, in place: it may be tied."""
    with torch.no_grad():
        module.weight[module.token_ids] = module.token_rows.to(module.weight)
    del module.token_rows, module.token_ids


@functools.cache
def _with_rows(layer: type[nn.Module]) -> type[nn.Module]:
    kind = _EmbeddingRows if issubclass(layer, nn.Embedding) else _OutputRows
    return type(f"Rows{layer.__name__}", (kind, layer), {})


class _EmbeddingRows:
    def forward(self, ids: Tensor) -> Tensor:
        y = super().forward(ids)  # [..., H]
        at = torch.searchsorted(self.token_ids, ids).clamp_max(len(self.token_ids) - 1)  # [...]
        rows = F.embedding(at, self.token_rows) * getattr(self, "embed_scale", 1.0)  # Gemma's embeddings are scaled
        return torch.where((self.token_ids[at] == ids)[..., None], rows.to(y.dtype), y)


class _OutputRows:
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # [..., V]
        bias = self.bias[self.token_ids].to(x.dtype) if self.bias is not None else None
        return y.index_copy(-1, self.token_ids, F.linear(x, self.token_rows.to(x.dtype), bias).to(y.dtype))


MIXINS = (_EmbeddingRows, _OutputRows)
