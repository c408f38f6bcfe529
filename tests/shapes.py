"""The options of a tiny text model of transformers, and a time limit."""

import contextlib
import signal
from collections.abc import Iterator

SHAPE = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@contextlib.contextmanager
def time_limit(seconds: int, error: type[BaseException] = TimeoutError) -> Iterator[None]:
    """Raise an error if the block takes longer."""

    def stop(number, frame):
        raise error

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
