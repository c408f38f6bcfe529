"""The longest documents that a model can read.

Models with a table of positions fail beyond its end. Some rotary frequencies depend on the other documents of a batch.
"""

import contextlib
import itertools
from collections.abc import Iterator

from torch import nn

UNLIMITED = 1 << 62
MAX_OFFSET = 8  # rows of a table before position 0; OPT and BART have 2


def n_positions(model: nn.Module) -> int:
    """Return the longest document, in tokens, that a decoder's config allows."""
    config = model.config.get_text_config()
    # MPT has biases for max_seq_len tokens.
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or UNLIMITED


def position_limit(model: nn.Module) -> int:
    """Return the longest document, in tokens, that the model can read; `UNLIMITED` without a table of positions.

    A table is an embedding, or a buffer of two or more dimensions, with a row for each of max_position_embeddings. The
    model can be on the meta device.
    """
    n = n_positions(model)
    if getattr(model.config.get_text_config(), "max_position_embeddings", None) is None:
        return n
    vocabulary = model.get_input_embeddings()
    embeddings = [m for m in model.base_model.modules() if isinstance(m, nn.Embedding) and m is not vocabulary]
    tables = [m for m in embeddings if n <= m.num_embeddings <= n + MAX_OFFSET]
    buffers = [b for b in model.base_model.buffers() if b.ndim >= 2 and n in b.shape]
    return n if tables or buffers else UNLIMITED


def rotary_limit(model: nn.Module) -> int:
    """Return the longest document, in tokens, whose rotary frequencies do not depend on other documents.

    Beyond it, `dynamic` frequencies depend on the longest document so far, and `longrope` selects one of two sets by
    the longest document of a batch (transformers#25104).
    """
    limits = [UNLIMITED]
    for module, layer_type, kind in _rotary_kinds(model):
        if kind == "longrope":
            options = module.config.rope_parameters
            options = options if layer_type is None else options[layer_type]
            limits.append(options["original_max_position_embeddings"])
        elif "dynamic" in kind:
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
    for module, layer_type, kind in _rotary_kinds(model):
        if "dynamic" in kind:
            prefix = "" if layer_type is None else f"{layer_type}_"
            device = getattr(module, f"{prefix}inv_freq").device
            original = getattr(module, f"{prefix}original_inv_freq").to(device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _rotary_kinds(model: nn.Module) -> Iterator[tuple[nn.Module, str | None, str]]:
    """Yield (rotary module, layer type, rope type); the layer type is None if all layers have the same rope type."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str):
                yield module, layer_type, kind


def batches_by_length(lengths: list[int], batch_size: int, limit: int) -> list[list[int]]:
    """Return batches of indices, the longest documents first; those beyond `limit` only with others of their length.

    Beyond the limit, the result for a document depends on the longest one in its batch.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    for _, group in itertools.groupby(longest_first, lambda i: max(lengths[i], limit)):
        indices = list(group)
        batches += [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return batches
