"""Attention for packed rows: each document by itself, without a mask and without a [T, T] matrix.

transformers keeps packed documents apart with a [T, T] mask, and then computes all T * T scores. Here the documents are
taken out of their rows, those of like length side by side, and each group is plain causal attention. So the cost is
about the sum of the squares of the documents' lengths, and a row may be as long as one likes.

Every architecture of transformers hands its attention mask on to the attention function as it is when it has four
dimensions. So the documents' places travel in the mask's place, which also takes them through activation checkpointing.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

NAME = "sdpa_documents"
LIKE_LENGTH = 0.7  # a group's shortest document is at least this share of its longest


class Group(NamedTuple):
    """Documents of like length."""

    places: Tensor  # [G, t] flat places in the rows; the tail of a shorter document repeats its last token's
    real: Tensor  # [tokens] flat places in [G, t] that are no such tail, nor another document's


def attend_by_document(model: torch.nn.Module) -> None:
    """Has a model of which packed rows are asked, and which has sdpa, use the attention of this file."""
    if model.config._attn_implementation == "sdpa":
        register()
        model.set_attn_implementation(NAME)


@functools.cache
def register() -> None:
    """Names this attention to transformers; with the first model, since all that it imports takes seconds."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, torch.compiler.disable(documents_attention))
    AttentionMaskInterface.register(NAME, sdpa_mask)


def as_mask(spans: Tensor) -> Tensor:
    """[D, 3] int64 (row, start, stop) of each document -> what `model(attention_mask=...)` takes.

    With two columns more, (start, stop) of the tokens in the row that the document begins with, or (0, 0).
    """
    return spans[None, None]


def documents_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """query [R, heads, T, d], key and value [R, kv_heads, T, d] -> [R, T, heads, d]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, _, columns, _ = query.shape
    spans = tuple(map(tuple, attention_mask[0, 0].tolist()))
    groups, back = _groups(spans, rows, columns, query.device)
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # [R * T, heads, d] each
    outputs = []
    for places, real in groups:
        q, k, v = (t.index_select(0, places.view(-1)).unflatten(0, places.shape).transpose(1, 2) for t in flat)
        # Tails need no mask: causal attention of the tokens before never sees them.
        mask = _window(kwargs.get("sliding_window"), q)
        attended, _ = sdpa_attention_forward(module, q, k, v, mask, **kwargs)  # [G, t, heads, d]
        outputs.append(attended.flatten(0, 1).index_select(0, real))
    outputs.append(outputs[0].new_zeros(1, *outputs[0].shape[1:]))  # what padding gets
    return torch.cat(outputs).index_select(0, back).unflatten(0, (rows, columns)), None


@functools.lru_cache(maxsize=4)  # all layers of a model ask for the same
def _groups(spans: tuple, rows: int, columns: int, device: torch.device) -> tuple[list[Group], Tensor]:
    """The groups, and for each place in the rows where its output stands in theirs, laid end to end."""
    groups, order = [], []
    remaining = torch.tensor([(*span, 0, 0)[:5] for span in spans])  # [D, 5]
    length = _lengths(remaining)  # [D]
    remaining = remaining[length.argsort(descending=True, stable=True)]
    while len(remaining):
        lengths = _lengths(remaining)
        size = int((lengths >= LIKE_LENGTH * lengths[0]).sum())
        row, start, _, prefix, prefix_stop = remaining[:size, :, None].unbind(1)  # [G, 1] each
        lengths, remaining = lengths[:size, None], remaining[size:]
        shared = prefix_stop - prefix
        steps = torch.minimum(torch.arange(int(lengths[0])), lengths - 1)  # [G, t]
        places = row * columns + torch.where(steps < shared, prefix + steps, start + steps - shared)  # [G, t]
        own = (torch.arange(int(lengths[0])) < lengths) & (steps >= shared)  # [G, t]
        real = own.view(-1).nonzero()[:, 0]  # [tokens]
        order.append(places.view(-1)[real])
        groups.append(Group(places.to(device), real.to(device)))
    order = torch.cat(order)
    back = torch.full((rows * columns,), len(order))  # [R * T]
    back[order] = torch.arange(len(order))
    return groups, back.to(device)


def _lengths(spans: Tensor) -> Tensor:
    """Tokens of each document with those that it shares, [D, 5] -> [D]."""
    return spans[:, 2] - spans[:, 1] + spans[:, 4] - spans[:, 3]


def _window(width: int | None, query: Tensor) -> Tensor | None:
    """The mask of sliding-window attention, where a document is longer than the window."""
    length = query.shape[2]
    if width is None or length <= width:
        return None
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    return ((distance >= 0) & (distance < width))[None, None]  # [1, 1, t, t]
