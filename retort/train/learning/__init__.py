"""The party that learns: passes over a batch, optimizer steps, learning rates, controllers."""
