"""Rollout engines, each imported lazily."""
