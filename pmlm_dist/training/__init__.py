"""The training run: optimizer, step, validation, checkpoints, metrics."""
