"""Evaluate a model without a training."""
