"""How long a text may be for a model.

Models that look positions up in a table fail beyond its end; some rotary frequencies depend on the other texts of a
batch.
"""

from torch import nn

UNLIMITED = 1 << 62
MAX_OFFSET = 8  # rows that a table has before position 0, as OPT's and BART's have 2


def position_limit(model: nn.Module) -> int:
    """Return the longest text, in tokens, that the model can read; `UNLIMITED` for rotary positions and the like.

    A table is an embedding, or a buffer of two dimensions or more, with a row for each of max_position_embeddings. It
    is found on the meta device, too.
    """
    config = model.config.get_text_config()
    n = getattr(config, "max_position_embeddings", None)
    if n is None:  # MPT's biases, which are made for max_seq_len tokens
        return getattr(config, "max_seq_len", None) or UNLIMITED
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
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if kind == "longrope":
                options = module.config.rope_parameters
                options = options if layer_type is None else options[layer_type]
                limits.append(options["original_max_position_embeddings"])
            elif "dynamic" in (kind or ""):
                limits.append(module.original_max_seq_len)
    return min(limits)
