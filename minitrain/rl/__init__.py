"""Online training: rounds of responses that are sampled, judged and trained on in the same process."""

from . import rewards_builtin  # imported to register its rewards

__all__ = ["rewards_builtin"]
