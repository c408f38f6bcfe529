"""Text for terminals."""

import os
import sys


def use_color() -> bool:
    """Return whether stdout is a terminal whose user has not turned colors off (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def escape(text: str) -> str:
    """Mark ends of lines, and escape characters that cannot be printed, since they could move a terminal's cursor."""
    return "".join("↵\n" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
