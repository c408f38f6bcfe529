"""The built-in losses. To add one, write a file in this package and import it here."""

from . import classify, dft, dpo, kd, kto, pairwise, policy, sft, value
from .base import (
    AddedFeatures,
    Loss,
    LossOutput,
    Models,
    add_features,
    create_loss,
    describe_loss,
    loss_options,
    register_loss,
    registered,
)

__all__ = [
    "AddedFeatures",
    "Loss",
    "LossOutput",
    "Models",
    "add_features",
    "classify",
    "create_loss",
    "describe_loss",
    "dft",
    "dpo",
    "kd",
    "kto",
    "loss_options",
    "pairwise",
    "policy",
    "register_loss",
    "registered",
    "sft",
    "value",
]
