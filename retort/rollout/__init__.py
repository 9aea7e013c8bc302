"""Writing by the student: plans and engines (imported lazily)."""

from retort.rollout.plan import RolloutPlan

__all__ = ["RolloutPlan"]
