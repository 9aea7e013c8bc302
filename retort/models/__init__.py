"""Models: forward passes and the loss core."""
