"""Environments: who answers to what a model wrote, turn by turn."""
