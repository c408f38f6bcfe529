"""How long a text may be for a model: those that look positions up in a table fail beyond its end."""

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
