"""Try out whether a model gives the same responses in a batch as alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

N_TOKENS, N_STEPS = 32, 4  # of the prompts and responses


def is_unchanged_in_batch(
    run: Callable[[list[list[int]], int], Sequence[Tensor]], n_positions: int, dtype: torch.dtype, padded: bool
) -> bool:
    """Return whether the logits of a response to a prompt are the same alone and in a batch of two prompts.

    Args:
        run: Returns the logits [B, V] of each step, for prompts and a number of steps.
        n_positions: Maximum number of tokens of a prompt with its response.
        dtype: Dtype of the model.
        padded: The other prompt is longer.
    """
    longest = max(2, min(N_TOKENS, n_positions - N_STEPS))
    length = 1 + longest // 2
    prompt = list(range(3, 3 + length))  # every vocabulary has these ids
    other = list(range(4, 4 + (longest if padded else length)))
    try:
        alone, batched = run([prompt], N_STEPS), run([prompt, other], N_STEPS)
    except Exception:  # the model cannot read these prompts; it may be able to read others
        return False
    tolerance = 1e-2 if dtype == torch.float32 else 5e-2
    for one, both in zip(alone, batched, strict=False):
        if float((one[0] - both[0]).abs().max()) > tolerance * float(one[0].abs().max()):
            return False
        if one[0].argmax() != both[0].argmax():
            break  # of two tokens that are almost equally likely
    return True
