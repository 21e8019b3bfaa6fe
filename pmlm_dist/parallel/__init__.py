"""Process groups and the sharded layers: parallelism has one address."""
