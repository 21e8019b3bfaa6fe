"""What a run will need, before it is queued: memory, time, communication. Pure functions of settings."""
