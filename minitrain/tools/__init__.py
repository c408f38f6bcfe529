"""Checks before a run, and analysis after it."""
