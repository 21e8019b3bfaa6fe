"""Checkpoints: fragments of tensors, files, folders, asynchronous saving, resuming."""
