"""Metrics of a run: TensorBoard and metrics.jsonl, step times, FLOPs, stragglers."""
