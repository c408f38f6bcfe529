"""What is checked and shown before a run: options, data, the model without weights, memory."""
