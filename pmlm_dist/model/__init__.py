"""The pseudo-masked Transformer."""
