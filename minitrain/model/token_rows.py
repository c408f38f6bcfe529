"""Trained rows of frozen embeddings, for tokens that are new to a model.

    embedding:  the vector of a token in `token_ids` is its row of `token_rows` [n, H], not of the weight
    LM head:    its logit is hidden @ row

The rows are parameters of their layer, and tied layers share them, as with PEFT's `trainable_token_indices`.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "token_rows"


def add(module: nn.Module, ids: list[int], rows: nn.Parameter | None = None) -> nn.Parameter:
    """Add trained rows to an embedding or a linear layer.

    Args:
        module: The layer.
        ids: Token ids in ascending order.
        rows: The rows of a tied layer; by default new ones, zeros in float32 on the device of the weight.

    Returns:
        The rows, shape [n, H].
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
    """Return the weight of a layer with its trained rows, in the dtype of the weight.

    Args:
        module: The layer.
        weight: Its full weight, shape [V, H].
        rows: The unsharded rows of a sharded layer, shape [n, H]; by default those of the layer.
    """
    if not has_rows(module):
        return weight
    rows = module.token_rows if rows is None else rows
    return weight.index_copy(0, module.token_ids, rows.to(weight.dtype))


def merge_rows(module: nn.Module) -> None:
    """Write the trained rows into the weight, in place because it can be tied."""
    with torch.no_grad():
        module.weight[module.token_ids] = module.token_rows.to(module.weight)
    del module.token_rows, module.token_ids


@functools.cache
def _with_rows(layer: type[nn.Module]) -> type[nn.Module]:
    mixin = _EmbeddingRows if issubclass(layer, nn.Embedding) else _OutputRows
    return type(f"Rows{layer.__name__}", (mixin, layer), {"is_fusible": False})


class _EmbeddingRows:
    def forward(self, ids: Tensor) -> Tensor:
        y = super().forward(ids)  # [..., H]
        index = torch.searchsorted(self.token_ids, ids).clamp_max(len(self.token_ids) - 1)  # [...]
        rows = F.embedding(index, self.token_rows) * getattr(self, "embed_scale", 1.0)  # Gemma scales its embeddings
        return torch.where((self.token_ids[index] == ids)[..., None], rows.to(y.dtype), y)


class _OutputRows:
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # [..., V]
        bias = self.bias[self.token_ids].to(x.dtype) if self.bias is not None else None
        return y.index_copy(-1, self.token_ids, F.linear(x, self.token_rows.to(x.dtype), bias).to(y.dtype))


MIXINS = (_EmbeddingRows, _OutputRows)
