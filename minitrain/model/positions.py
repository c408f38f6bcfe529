"""How long a text may be for a model.

Models that look positions up in a table fail beyond its end; some rotary frequencies depend on the other texts of a
batch.
"""

import contextlib
import itertools
from collections.abc import Iterator

from torch import nn

UNLIMITED = 1 << 62
MAX_OFFSET = 8  # rows that a table has before position 0, as OPT's and BART's have 2


def n_positions(model: nn.Module) -> int:
    """Return the longest text, in tokens, that a decoder's config allows."""
    config = model.config.get_text_config()
    # MPT's biases are made for max_seq_len tokens.
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or UNLIMITED


def position_limit(model: nn.Module) -> int:
    """Return the longest text, in tokens, that the model can read; `UNLIMITED` for rotary positions and the like.

    A table is an embedding, or a buffer of two dimensions or more, with a row for each of max_position_embeddings. It
    is found on the meta device, too.
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
    """Return the longest text, in tokens, whose rotary frequencies do not depend on other texts.

    Beyond it, `dynamic` frequencies follow the longest text so far, and `longrope` chooses one of two sets by
    the longest text of a batch (transformers#25104).
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
    """Inside, texts beyond `rotary_limit` may change `dynamic` frequencies; afterwards they are as when loaded."""
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
    """Yield each rotary module with its type, or with each type of layer (None where there is one) and that one's."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str):
                yield module, layer_type, kind


def batches_by_length(lengths: list[int], batch_size: int, limit: int) -> list[list[int]]:
    """Return indices in batches, the longest texts first. Texts beyond `limit` are only with others of their length.

    What a model does with a text beyond a limit depends on the longest one in its batch.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    for _, group in itertools.groupby(longest_first, lambda i: max(lengths[i], limit)):
        indices = list(group)
        batches += [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return batches
