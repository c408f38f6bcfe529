"""Attention of packed rows, per document and without a [T, T] mask or matrix.

transformers separates packed documents with a [T, T] mask and computes all T * T scores. Here documents of similar
length are gathered from their batch rows into groups, and each group is plain causal attention. The cost is about the
sum of the squared document lengths, so a row can have any length.

transformers passes a four-dimensional attention mask unchanged to the attention function, in every architecture. So the
spans of the documents are passed as the mask. This also works with activation checkpointing.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from minitrain.batch import to_device

NAME = "sdpa_documents"
MIN_LENGTH_RATIO = 0.85  # of the shortest to the longest document in a group, unless there is
MAX_PADDING = 1 / 64  # of all tokens, at most this much padding in the group


class Group(NamedTuple):
    """Documents of similar length."""

    positions: Tensor  # [G, t] flat positions in the batch; shorter documents are padded with their last position
    lengths: Tensor  # [G] number of tokens of each document
    valid: Tensor  # [tokens] flat positions in [G, t] without padding and shared prefixes


def attend_by_document(model: torch.nn.Module) -> None:
    """Use this attention for packed rows of a model with sdpa."""
    if model.config._attn_implementation == "sdpa":
        register()
        model.set_attn_implementation(NAME)


@functools.cache
def register() -> None:
    """Register this attention with transformers; not at import, since these imports take seconds."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, torch.compiler.disable(documents_attention))
    AttentionMaskInterface.register(NAME, sdpa_mask)


def as_mask(spans: Tensor) -> Tensor:
    """Return the `attention_mask` for documents at these spans.

    Args:
        spans: (row, start, stop) of each document, int64, shape [D, 3]. With shape [D, 5] the last two columns are
            (start, stop) of a shared prefix in the row, or (0, 0).
    """
    return spans[None, None]


def documents_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Compute attention within documents, with the signature that transformers expects.

    Args:
        module: The attention layer.
        query: Shape [R, heads, T, d].
        key: Shape [R, kv_heads, T, d].
        value: Shape [R, kv_heads, T, d].
        attention_mask: The result of `as_mask`; any other mask is passed to sdpa.
        **kwargs: Options of transformers' sdpa.

    Returns:
        The output, shape [R, T, heads, d], and no attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows, _, columns, _ = query.shape
    groups, inverse = group_documents(attention_mask[0, 0], rows, columns, query.device)
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # [R * T, heads, d] each
    outputs = []
    for positions, _, valid in groups:
        q, k, v = (t.index_select(0, positions.view(-1)).unflatten(0, positions.shape).transpose(1, 2) for t in flat)
        # Padding at the end needs no mask: in causal attention, earlier tokens do not attend to it.
        mask = _window(kwargs.get("sliding_window"), q)
        attended, _ = sdpa_attention_forward(module, q, k, v, mask, **kwargs)  # [G, t, heads, d]
        outputs.append(attended.flatten(0, 1).index_select(0, valid))
    return scatter_documents(outputs, inverse, rows), None


def group_documents(spans: Tensor, rows: int, columns: int, device: torch.device) -> tuple[list[Group], Tensor]:
    """Return groups of documents of similar length, and the index that `scatter_documents` takes.

    Args:
        spans: As in `as_mask`, shape [D, 3 or 5].
        rows: R, the number of batch rows.
        columns: T, the number of tokens of a row.
        device: Device of the result.
    """
    return _groups(tuple(map(tuple, spans.tolist())), rows, columns, device)


def scatter_documents(outputs: list[Tensor], inverse: Tensor, rows: int) -> Tensor:
    """Return the outputs of each group at `valid` in the layout of the batch, shape [R, T, ...]; 0 at padding."""
    padding = outputs[0].new_zeros(1, *outputs[0].shape[1:])
    return torch.cat([*outputs, padding]).index_select(0, inverse).unflatten(0, (rows, -1))


@functools.lru_cache(maxsize=4)  # all layers of a model pass the same arguments
def _groups(spans: tuple, rows: int, columns: int, device: torch.device) -> tuple[list[Group], Tensor]:
    groups, order = [], []
    remaining = torch.tensor([(*span, 0, 0)[:5] for span in spans])  # [D, 5]
    length = _lengths(remaining)  # [D]
    remaining = remaining[length.argsort(descending=True, stable=True)]
    while len(remaining):
        lengths = _lengths(remaining)
        padding = (lengths[0] - lengths).cumsum(0)  # [D] of a group up to each document
        size = int(((lengths >= MIN_LENGTH_RATIO * lengths[0]) | (padding <= MAX_PADDING * length.sum())).sum())
        row, start, _, prefix, prefix_stop = remaining[:size, :, None].unbind(1)  # [G, 1] each
        lengths, remaining = lengths[:size, None], remaining[size:]
        shared = prefix_stop - prefix
        steps = torch.minimum(torch.arange(int(lengths[0])), lengths - 1)  # [G, t]
        positions = row * columns + torch.where(steps < shared, prefix + steps, start + steps - shared)  # [G, t]
        is_own = (torch.arange(int(lengths[0])) < lengths) & (steps >= shared)  # [G, t]
        valid = is_own.view(-1).nonzero()[:, 0]  # [tokens]
        order.append(positions.view(-1)[valid])
        groups.append(Group(*(to_device(each, device) for each in (positions, lengths[:, 0], valid))))
    order = torch.cat(order)
    inverse = torch.full((rows * columns,), len(order))  # [R * T]
    inverse[order] = torch.arange(len(order))
    return groups, to_device(inverse, device)


def _lengths(spans: Tensor) -> Tensor:
    """Return the number of tokens of each document with its shared prefix, for spans [D, 5], shape [D]."""
    return spans[:, 2] - spans[:, 1] + spans[:, 4] - spans[:, 3]


def _window(width: int | None, query: Tensor) -> Tensor | None:
    """Return the mask of sliding-window attention, or None if no document is longer than the window."""
    length = query.shape[2]
    if width is None or length <= width:
        return None
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    return ((distance >= 0) & (distance < width))[None, None]  # [1, 1, t, t]
