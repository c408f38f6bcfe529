"""Attention of packed rows by one kernel for sequences of different lengths (FlashAttention, on CUDA).

`Batch.sequences` has the cumulative lengths, which are made once a batch on the CPU and copied with it. They are passed
as the mask (see `attention`), and the numbers that the kernel needs on the host as the sizes of its dimensions. So no
layer waits for the device, and other numbers do not recompile a block.
"""

import functools
import inspect

import torch
from torch import Tensor

from minitrain.batch import Sequences

from .logprobs import autocast_dtype

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256  # of the kernel, which also needs a multiple of 8
_kernel = {}  # torch's function, and whether it needs as many heads of keys as of queries


@functools.cache
def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch has the kernel, with windows and a scale (torch 2.11), and the device can run it."""
    if device.type != "cuda" or dtype not in DTYPES:
        return False
    from torch.nn.attention import varlen  # imports the compiler

    arguments = inspect.signature(varlen.varlen_attn).parameters
    if not {"scale", "window_size"} <= arguments.keys():
        return False
    _kernel["call"], _kernel["repeats_heads"] = varlen.varlen_attn, "enable_gqa" not in arguments
    q, ends = torch.zeros(8, 1, 64, device=device, dtype=dtype), torch.tensor([0, 8], device=device).int()
    try:
        varlen.varlen_attn(q, q, q, ends, ends, 8, 8, window_size=(-1, 0))
    except RuntimeError:  # the GPU is too old, or torch was built without it
        return False
    return True


def as_mask(sequences: Sequences) -> Tensor:
    """Return the `attention_mask` for these sequences: a view of the table, shape [len(table), max_q, max_k, S]."""
    return sequences.table.view(-1, 1, 1, 1).expand(-1, sequences.max_q, sequences.max_k, sequences.count)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, window: int | None, dropout: float
) -> Tensor:
    """Compute causal attention within sequences.

    Queries are the last tokens of a sequence, whose keys may begin with a shared prompt.

    Args:
        query: Shape [R, heads, T, d].
        key: Shape [R, kv_heads, T, d].
        value: Shape [R, kv_heads, T, d].
        mask: The result of `as_mask`.
        scale: Factor of the scores; None divides by the square root of d.
        window: Number of keys that a query attends to.
        dropout: Probability with which an attention weight is dropped.

    Returns:
        The output, shape [R, T, heads, d].
    """
    rows, heads, columns, size = query.shape
    dtype, table, n = autocast_dtype(query), mask[:, 0, 0, 0], mask.shape[3]
    q, k, v = (t.to(dtype).transpose(1, 2).flatten(0, 1) for t in (query, key, value))  # [R * T, heads, d] each
    if table.shape[0] > 2 * (n + 1):  # shared prompts
        positions = table[2 * (n + 1) :]  # [K]
        k, v = k.index_select(0, positions), v.index_select(0, positions)
    ends = table[: n + 1], table[n + 1 : 2 * (n + 1)]  # [S + 1] each
    if dropout or dtype not in DTYPES or size % 8 or size > MAX_HEAD_SIZE or value.shape[-1] != size:
        output = _attend_with_mask(q, k, v, *ends, scale, window, dropout)
    else:
        options = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
        if heads != key.shape[1] and _kernel["repeats_heads"]:
            k, v = (t.repeat_interleave(heads // key.shape[1], 1) for t in (k, v))
        elif heads != key.shape[1]:
            options["enable_gqa"] = True
        output = _kernel["call"](q, k, v, *ends, mask.shape[1], mask.shape[2], **options)
    return output.unflatten(0, (rows, columns))


def _attend_with_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """Compute the attention that the kernel cannot, with a [Q, K] mask: slow, but the same numbers."""
    queries = torch.arange(len(q), device=q.device)[:, None]  # [Q, 1]
    of_query = torch.searchsorted(q_ends, queries, right=True) - 1  # [Q, 1] its sequence
    keys = torch.arange(len(k), device=k.device)  # [K]
    of_key = torch.searchsorted(k_ends, keys, right=True) - 1  # [K]
    distance = k_ends[of_query + 1] - (q_ends[of_query + 1] - queries) - keys  # [Q, K]
    mask = (of_query == of_key) & (distance >= 0)  # [Q, K]
    if window is not None:
        mask &= distance < window
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, Q or K, d] each
    gqa = q.shape[1] != k.shape[1]
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=gqa)
    return output[0].transpose(0, 1)
