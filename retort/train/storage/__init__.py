"""The folder of a run: who may write into it, its metrics and its checkpoints."""
