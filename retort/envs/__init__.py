"""Environments, which reply to the turns of a model."""
