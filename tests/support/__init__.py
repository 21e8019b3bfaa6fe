"""Helpers of the tests: worlds of ranks, small corpora, models and runs."""
