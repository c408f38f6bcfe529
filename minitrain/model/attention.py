"""Attention of packed rows, per document and without a [T, T] mask or matrix.

transformers separates packed documents with a [T, T] mask and computes all T * T scores. Here documents of similar
length are gathered from their batch rows into groups, and each group is plain causal attention. The cost is about the
sum of the squared document lengths, so a row can have any length.

transformers passes a four-dimensional attention mask unchanged to the attention function, in every architecture. So the
spans of the documents are passed as the mask. This also works with activation checkpointing. Compiled blocks contain
this attention as a custom operator, because the number of groups differs between batches. On a GPU, one kernel replaces
the groups (`varlen`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports the compiler at once

from minitrain.batch import Batch, to_device

from . import varlen
from .decoder import decoder_of
from .logprobs import autocast_dtype

NAME = "sdpa_documents"
MIN_LENGTH_RATIO = 0.85  # of the shortest to the longest document in a group, unless there is
MAX_PADDING = 1 / 64  # of all tokens, at most this much padding in the group


class Group(NamedTuple):
    """Documents of similar length."""

    positions: Tensor  # [G, t] flat positions in the batch; shorter documents are padded with their last position
    lengths: Tensor  # [G] number of tokens of each document
    valid: Tensor  # [tokens] flat positions in [G, t] without padding and shared prefixes
    first: int  # columns before it are only in shared prefixes


def attend_by_document(model: nn.Module) -> None:
    """Use this attention for packed rows of a model with sdpa."""
    if model.config._attn_implementation == "sdpa":
        register()
        model.set_attn_implementation(NAME)


@functools.cache
def register() -> None:
    """Register this attention with transformers; not at import, since these imports take seconds."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, documents_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def document_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the inputs of a decoder that separate the documents of a batch.

    They are the mask of this attention, or the cumulative lengths of the FlashAttention of transformers. Without these,
    it waits for the device in each layer to find the documents in `position_ids`.
    """
    implementation = model.config._attn_implementation
    if implementation == NAME and batch.packed:
        dtype = autocast_dtype(model.get_input_embeddings().weight)
        by_kernel = varlen.is_supported(batch.input_ids.device, dtype)
        return {"attention_mask": varlen.as_mask(batch.sequences) if by_kernel else as_mask(batch.layout)}
    is_searched = batch.packed or len(batch.input_ids) == 1  # not several rows of a document each
    if implementation.startswith("flash_attention") and is_searched and _takes_options(type(decoder_of(model))):
        table, count, max_q, max_k = batch.sequences
        ends = {"cu_seq_lens_q": table[: count + 1], "cu_seq_lens_k": table[count + 1 : 2 * (count + 1)]}
        return {"attention_mask": None, "max_length_q": max_q, "max_length_k": max_k} | ends
    return {"attention_mask": None}


@functools.cache
def _takes_options(decoder: type[nn.Module]) -> bool:
    """Return whether a decoder passes other keyword arguments to its attention."""
    kinds = [parameter.kind for parameter in inspect.signature(decoder.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def as_mask(spans: Tensor) -> Tensor:
    """Return the `attention_mask` for documents at these spans.

    Args:
        spans: (row, start, stop) of each document, int64, shape [D, 3]. With shape [D, 5] the last two columns are
            (start, stop) of a shared prefix in the row, or (0, 0).
    """
    return spans[None, None]


def documents_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Compute attention within documents, with the signature that transformers expects.

    Args:
        module: The attention layer.
        query: Shape [R, heads, T, d].
        key: Shape [R, kv_heads, T, d].
        value: Shape [R, kv_heads, T, d].
        attention_mask: The mask of `document_inputs`; any other mask is passed to sdpa.
        **kwargs: Options of transformers' sdpa.

    Returns:
        The output, shape [R, T, heads, d], and no attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype not in (torch.int64, torch.int32):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window, scale, dropout = kwargs.get("sliding_window"), kwargs.get("scaling"), kwargs.get("dropout", 0.0)
    if attention_mask.dtype == torch.int32:
        assert kwargs.get("position_bias") is None
        return varlen.attend(query, key, value, attention_mask, scale, window, dropout), None
    if torch.compiler.is_compiling() and not dropout and kwargs.get("position_bias") is None:
        dtype = autocast_dtype(query)  # the backward pass computes it again, outside of autocast
        q, k, v = (t.to(dtype).transpose(1, 2) for t in (query, key, value))
        return attend_in_groups(q, k, v, attention_mask[0, 0], scale, window), None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0]

    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return _in_groups(q, k, v, attention_mask[0, 0], window, attend), None


@_disable_dynamo
def _in_groups(
    query: Tensor, key: Tensor, value: Tensor, spans: Tensor, window: int | None, attend: Callable[..., Tensor]
) -> Tensor:
    """Call `attend` on each group of documents, [G, heads, t, d] -> [G, t, heads, d]; return [R, T, heads, d].

    It gets only the last queries where the first ones are in shared prefixes, whose outputs another document has.
    """
    rows, columns = query.shape[:2]
    groups, inverse = group_documents(spans, rows, columns, query.device)
    flat = [t.flatten(0, 1) for t in (query, key, value)]  # [R * T, heads, d] each
    outputs = []
    for positions, _, valid, first in groups:
        length, parts = positions.shape[1], (positions[:, first:], positions, positions)
        q, k, v = (
            t.index_select(0, part.reshape(-1)).unflatten(0, part.shape).transpose(1, 2)
            for t, part in zip(flat, parts, strict=True)
        )
        # Padding at the end needs no mask: in causal attention, earlier tokens do not attend to it.
        attended = attend(q, k, v, _mask(window, first, length, q.device))  # [G, t - first, heads, d]
        own = valid - first * (valid // length + 1) if first else valid  # flat positions in [G, t - first]
        outputs.append(attended.flatten(0, 1).index_select(0, own))
    return scatter_documents(outputs, inverse, rows)


@torch.library.custom_op("minitrain::attend_in_groups", mutates_args=())
def attend_in_groups(
    query: Tensor, key: Tensor, value: Tensor, spans: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Compute attention within documents at `spans` (see `as_mask`), as one operator for compiled blocks.

    Args:
        query: Shape [R, T, heads, d].
        key: Shape [R, T, kv_heads, d].
        value: Shape [R, T, kv_heads, d].
        spans: Shape [D, 3 or 5], on the CPU.
        scale: Factor of the scores; None divides by the square root of d.
        window: Number of keys that a query attends to.

    Returns:
        The output, shape [R, T, heads, d].
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        output = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
        return output.transpose(1, 2)

    return _in_groups(query, key, value, spans, window, attend)


@attend_in_groups.register_fake
def _(query, key, value, spans, scale, window):
    return query.new_empty(*query.shape[:3], value.shape[-1])


@torch.library.custom_op("minitrain::attend_in_groups_backward", mutates_args=())
def attend_in_groups_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, spans: Tensor, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, for that of the output. The attention is computed again."""
    forward = functools.partial(attend_in_groups._init_fn, spans=spans, scale=scale, window=window)
    _, gradients = torch.func.vjp(forward, query, key, value)  # an operator records no gradients of its own
    return tuple(gradient.contiguous() for gradient in gradients(grad))


@attend_in_groups_backward.register_fake
def _(grad, query, key, value, spans, scale, window):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple:
    return *attend_in_groups_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None


attend_in_groups.register_autograd(_backward, setup_context=_save)


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
    table = torch.tensor([(*span, 0, 0)[:5] for span in spans])  # [D, 5]
    length = _lengths(table)  # [D]
    table = table[length.argsort(descending=True, stable=True)]
    # Documents that are mostly a shared prefix are apart, since it needs no queries in their groups.
    is_prefix = 2 * (table[:, 4] - table[:, 3]) > _lengths(table)  # [D]
    remaining, rest = table[~is_prefix], table[is_prefix]
    while len(remaining) or len(rest):
        if not len(remaining):
            remaining, rest = rest, rest[:0]
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
        first = int(shared.min())
        groups.append(Group(*(to_device(each, device) for each in (positions, lengths[:, 0], valid)), first))
    order = torch.cat(order)
    inverse = torch.full((rows * columns,), len(order))  # [R * T]
    inverse[order] = torch.arange(len(order))
    return groups, to_device(inverse, device)


def _lengths(spans: Tensor) -> Tensor:
    """Return the number of tokens of each document with its shared prefix, for spans [D, 5], shape [D]."""
    return spans[:, 2] - spans[:, 1] + spans[:, 4] - spans[:, 3]


def _mask(window: int | None, first: int, length: int, device: torch.device) -> Tensor | None:
    """Return the causal mask of the queries from `first` on; None if there are all, without a shorter window."""
    if first == 0 and (window is None or length <= window):
        return None
    columns = torch.arange(length, device=device)
    distance = columns[first:, None] - columns  # [t - first, t]
    return ((distance >= 0) & (distance < (window or length)))[None, None]  # [1, 1, t - first, t]
