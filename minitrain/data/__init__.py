"""Data files -> batches."""

from . import formats_chat, formats_preference  # they register their formats

__all__ = ["formats_chat", "formats_preference"]
