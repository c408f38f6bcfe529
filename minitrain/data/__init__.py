"""Data files -> batches."""

from . import conversations, judged  # they register their schemas

__all__ = ["conversations", "judged"]
