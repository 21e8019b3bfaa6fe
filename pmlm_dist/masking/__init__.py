"""Pseudo-masking: predicted tokens, their factorization order, and visibility. Pure functions of arrays."""
