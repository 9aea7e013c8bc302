"""The runner and what it keeps: batches, updates, checkpoints, metrics, records."""
