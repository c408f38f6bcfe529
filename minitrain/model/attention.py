"""Attention for packed rows: each document by itself, without a mask and without a [T, T] matrix.

transformers keeps packed documents apart with a [T, T] mask, and then computes all T * T scores. Here the row is
split at the borders of its documents and each piece is plain causal attention, so that the cost is the sum of the
squares of the documents' lengths, and a row may be as long as one likes.

Every architecture of transformers hands its attention mask on to the attention function as it is when it has four
dimensions. So the borders travel in the mask's place, which also takes them through activation checkpointing.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_documents"


def as_mask(spans: Tensor) -> Tensor:
    """[D, 3] int64 (row, start, stop) of each document -> what `model(attention_mask=...)` takes."""
    return spans[None, None]


@torch.compiler.disable
def documents_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """query [R, heads, T, d], key and value [R, kv_heads, T, d] -> [R, T, heads, d]."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, _, columns, _ = query.shape
    sizes, is_document = _pieces(attention_mask[0, 0], rows, columns)
    # One split and one concatenation: slicing document by document would cost a full-size gradient for each.
    pieces = [t.transpose(0, 1).flatten(1, 2).split(sizes, 1) for t in (query, key, value)]  # [heads, t, d] each
    outputs = []
    for q, k, v, wanted in zip(*pieces, is_document, strict=True):
        if wanted:
            mask = _window(kwargs.get("sliding_window"), q)
            outputs.append(sdpa_attention_forward(module, q[None], k[None], v[None], mask, **kwargs)[0][0])
        else:
            outputs.append(v.new_zeros(q.shape[1], q.shape[0], v.shape[2]))
    return torch.cat(outputs).unflatten(0, (rows, columns)), None


def _pieces(spans: Tensor, rows: int, columns: int) -> tuple[list[int], list[bool]]:
    """Lengths of documents and gaps in the flattened rows, in order, and which of them are documents."""
    sizes, is_document, position = [], [], 0
    for row, start, stop in spans.tolist():
        begin = row * columns + start
        if begin > position:
            sizes.append(begin - position)
            is_document.append(False)
        sizes.append(stop - start)
        is_document.append(True)
        position = row * columns + stop
    if position < rows * columns:
        sizes.append(rows * columns - position)
        is_document.append(False)
    return sizes, is_document


def _window(width: int | None, query: Tensor) -> Tensor | None:
    """The mask of sliding-window attention, where the document is longer than the window."""
    length = query.shape[1]
    if width is None or length <= width:
        return None
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    return ((distance >= 0) & (distance < width))[None, None]  # [1, 1, t, t]


AttentionInterface.register(NAME, documents_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
