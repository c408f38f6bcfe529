"""The parts of a training run: setup, optimizer, precision, evaluation, checkpoints, the run directory, metrics."""
