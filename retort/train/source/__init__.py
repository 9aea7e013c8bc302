"""The party that rollouts come from: which prompts, in what order, from the engine or from what is kept."""
