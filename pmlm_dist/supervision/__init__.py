"""Supervision of ranks: heartbeat, signals, exit codes, run lock, attempts, restarts. Without torch."""
