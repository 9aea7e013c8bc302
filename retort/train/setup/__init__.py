"""Preparation of a run: the data, the prompts, and every check before the first token."""
