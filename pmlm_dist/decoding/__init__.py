"""Writing text with the model: incremental forward pass, searches, infilling."""
