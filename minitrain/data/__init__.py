"""Read data files, tokenize their rows and build batches."""

from . import formats_chat, formats_preference, formats_prompt, formats_scores  # imported to register row formats

__all__ = ["formats_chat", "formats_preference", "formats_prompt", "formats_scores"]
