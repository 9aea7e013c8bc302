"""Teachers, and the views of a rollout that they score (models are imported lazily)."""

from retort.teachers.view import View

__all__ = ["View"]
