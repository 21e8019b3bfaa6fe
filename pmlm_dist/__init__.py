"""Distributed pre-training of pseudo-masked language models (UniLMv2)."""

__version__ = "0.1.0"
