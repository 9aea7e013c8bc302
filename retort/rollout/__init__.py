"""Rollouts: plans, and engines that generate completions (imported lazily)."""

from retort.rollout.plan import RolloutPlan

__all__ = ["RolloutPlan"]
