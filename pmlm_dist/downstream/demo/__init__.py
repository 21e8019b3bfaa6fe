"""The tasks of `make demo-tasks`."""
