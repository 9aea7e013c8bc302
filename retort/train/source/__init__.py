"""The source of rollouts: which prompts in which order, from the engine or from the cache."""
