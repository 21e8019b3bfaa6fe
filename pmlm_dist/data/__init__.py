"""From shards to batches, in an exact order."""
