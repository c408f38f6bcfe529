"""Losses by name. A new one is a file in this folder, imported here, and its test."""

from . import classify, dft, dpo, kd, kto, pairwise, policy, sft, value
from .base import Loss, LossOutput, create_loss, describe_loss, register_loss, registered

__all__ = [
    "Loss",
    "LossOutput",
    "classify",
    "create_loss",
    "describe_loss",
    "dft",
    "dpo",
    "kd",
    "kto",
    "pairwise",
    "policy",
    "register_loss",
    "registered",
    "sft",
    "value",
]
