"""Checks and previews of a run: options, data, the model without weights, memory."""
