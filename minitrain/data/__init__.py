"""Data files -> batches."""

from . import formats_chat as conversations  # they register their schemas
from . import formats_preference as judged

__all__ = ["conversations", "judged"]
