"""From settings to a run that is ready to begin: the data, the prompts, and every check before the first token."""
