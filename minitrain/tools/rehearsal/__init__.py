"""Rehearse a run: all its parts in a minute, on a CPU, with a small model."""
