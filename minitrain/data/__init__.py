"""Read data files, tokenize their rows and build batches."""

from . import formats_chat, formats_preference, formats_prompt  # imported to register their row formats

__all__ = ["formats_chat", "formats_preference", "formats_prompt"]
