"""Distributed pre-training of pseudo-masked language models (UniLMv2)."""
