"""Teachers, and the views of a rollout that they score (models are imported lazily)."""

from retort.teachers.view import View
from retort.weights.debate import debate_weights

__all__ = ["View", "debate_weights"]
