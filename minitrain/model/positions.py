"""The maximum document length of a model.

Models with a position table fail beyond its end. Some rotary frequencies depend on the other documents of a batch.
"""

import contextlib
import itertools
from collections.abc import Iterator

from torch import nn

from .decoder import decoder_of

UNLIMITED = 1 << 62
N_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")  # options of a config
MAX_OFFSET = 8  # rows of a position table before position 0; OPT and BART have 2


def n_positions(model: nn.Module) -> int:
    """Return the longest document, in tokens, that a decoder's config allows."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in N_POSITIONS)
    return next((n for n in limits if n and n > 0), UNLIMITED)  # -1 in XLNet


def position_limit(model: nn.Module) -> int:
    """Return the longest document, in tokens, that the model can read; `UNLIMITED` without a position table.

    A table is an embedding, or a buffer of two or more dimensions, with a row for each position. The model can be on
    the meta device.
    """
    n = n_positions(model)
    if not any(getattr(model.config.get_text_config(), name, None) for name in N_POSITIONS[:-1]):
        return n  # MPT has no table, but biases for max_seq_len tokens
    decoder, vocabulary = decoder_of(model), model.get_input_embeddings()
    embeddings = [m for m in decoder.modules() if isinstance(m, nn.Embedding) and m is not vocabulary]
    tables = [m for m in embeddings if n <= m.num_embeddings <= n + MAX_OFFSET]
    buffers = [b for b in decoder.buffers() if b.ndim >= 2 and n in b.shape]
    return n if tables or buffers else UNLIMITED


def rotary_limit(model: nn.Module) -> int:
    """Return the longest document, in tokens, whose rotary frequencies do not depend on other documents.

    Beyond it, `dynamic` frequencies depend on the longest document so far. `longrope` selects one of two sets of
    frequencies by the longest document of a batch (transformers#25104).
    """
    limits = [UNLIMITED]
    for module, layer_type, rope_type in _rope_types(model):
        if rope_type == "longrope":
            options = module.config.rope_parameters
            options = options if layer_type is None else options[layer_type]
            limits.append(options["original_max_position_embeddings"])
        elif "dynamic" in rope_type:
            limits.append(module.original_max_seq_len)
    return min(limits)


@contextlib.contextmanager
def restoring_rotary(model: nn.Module) -> Iterator[None]:
    """Reset `dynamic` frequencies after the context, where documents beyond `rotary_limit` can change them."""
    try:
        yield
    finally:
        _reset_rotary(model)


def _reset_rotary(model: nn.Module) -> None:
    for module, layer_type, rope_type in _rope_types(model):
        if "dynamic" in rope_type:
            prefix = "" if layer_type is None else f"{layer_type}_"
            device = getattr(module, f"{prefix}inv_freq").device
            original = getattr(module, f"{prefix}original_inv_freq").to(device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _rope_types(model: nn.Module) -> Iterator[tuple[nn.Module, str | None, str]]:
    """Yield (rotary module, layer type, rope type); the layer type is None if all layers have the same rope type."""
    for module in model.modules():
        rope_types = getattr(module, "rope_type", None)
        for layer_type, rope_type in (rope_types if isinstance(rope_types, dict) else {None: rope_types}).items():
            if isinstance(rope_type, str):
                yield module, layer_type, rope_type


def batches_by_length(lengths: list[int], batch_size: int, limit: int) -> list[list[int]]:
    """Return batches of indices, longest documents first. Documents beyond `limit` are batched by equal length.

    Beyond the limit, the output for a document depends on the longest one in its batch.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    for _, group in itertools.groupby(longest_first, lambda i: max(lengths[i], limit)):
        indices = list(group)
        batches += [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return batches
