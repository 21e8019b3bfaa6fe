"""Pseudo-masking: which tokens are hidden, in what order, and who may see whom. Pure functions of arrays."""
