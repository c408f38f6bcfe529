"""Online training: rounds of responses that are sampled, judged and trained on in the same process."""

from . import reward_models, rewards_builtin  # imported to register their rewards

__all__ = ["reward_models", "rewards_builtin"]
