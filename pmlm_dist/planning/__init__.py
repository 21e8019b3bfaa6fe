"""Estimates of a run before it is queued: memory, step time, communication. Pure functions of settings."""
