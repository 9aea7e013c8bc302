"""The folder of a run: its lock, its metrics and its checkpoints."""
