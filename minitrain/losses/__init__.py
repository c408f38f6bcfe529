"""Losses by name. A new one is a file in this folder, imported here, and its test."""

from . import dft, dpo, kd, kto, pairwise, sft
from .base import Loss, LossOutput, create_loss, register_loss, registered

__all__ = [
    "Loss",
    "LossOutput",
    "create_loss",
    "dft",
    "dpo",
    "kd",
    "kto",
    "pairwise",
    "register_loss",
    "registered",
    "sft",
]
